"""A data set of emoji and their captions: a folder of pictures that `bldm train` reads.

    apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core
    python examples/emoji/make_dataset.py --out emoji

Pictures: every fully qualified emoji of Unicode's emoji-test.txt, drawn with Noto Color Emoji on white, 64 x 64 pixels.
Captions: its name, the name with an article, its name and keywords from CLDR's English annotations, and single keywords.
A share of the families goes to test/, the rest to train/; a family is an emoji with all its skin tones and genders, so that no
variant of a held-out emoji is trained on. Which family goes where depends on its name alone.
With --text the features of all captions are written beside them: a machine without the text encoder can then train.
"""

import hashlib
import html
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
GLYPH = 109  # the one size this bitmap font has: glyphs of 136 x 128 pixels
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
GENDER_SIGN = re.compile("\u200d[\u2640\u2642]")
PERSON = re.compile("[\U0001f468\U0001f469]")  # man, woman
GENDER_WORD = re.compile(r"^(man|woman|men|women|person|people|boy|girl|child)\b ?")
# Genders that have code points of their own: Unicode's neutral name of each.
NEUTRAL = {
    "old man": "older person",
    "old woman": "older person",
    "prince": "person with crown",
    "princess": "person with crown",
    "Santa Claus": "mx claus",
    "Mrs. Claus": "mx claus",
    "breast-feeding": "person feeding baby",
    "woman feeding baby": "person feeding baby",
    "man feeding baby": "person feeding baby",
}
NAMED_BY_WHAT_FOLLOWS = ("flag", "keycap")  # "flag: Japan" is no variant of "flag: France"
WITHOUT_ARTICLE = ("Flags", "Symbols", "Component")
SOURCES = """# Emoji with captions

Made by examples/emoji/make_dataset.py: {train} pictures to train on, {test} of {families} held-out families of names.

- Pictures: Noto Color Emoji (Google), SIL Open Font License 1.1, Debian package fonts-noto-color-emoji.
- Names: emoji-test.txt of Unicode (Debian package unicode-data), Unicode terms of use.
- Keywords: English annotations of CLDR (Debian package unicode-cldr-core), Unicode licence (Unicode-DFS-2016).
"""


@dataclass
class Emoji:
    """One emoji: its characters, Unicode's name and category, CLDR's keywords."""

    text: str
    name: str
    category: str
    keywords: list[str]

    @property
    def file(self) -> str:
        return "-".join(f"{ord(c):x}" for c in self.text) + ".png"


def read_emoji(path: Path, annotations: Path) -> list[Emoji]:
    """All fully qualified emoji, in Unicode's order."""
    keywords = read_keywords(annotations)
    category, found = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            category = line.removeprefix("# group: ")
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)", line)
        if match:
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            found.append(Emoji(text, match[2], category, keywords.get(text.replace("\ufe0f", ""), [])))
    return found


def read_keywords(folder: Path) -> dict[str, list[str]]:
    """Keywords by the characters of an emoji, variation selectors left out."""
    found = {}
    for part in ("annotations", "annotationsDerived"):
        text = (folder / part / "en.xml").read_text(encoding="utf-8")
        for characters, words in re.findall(r'<annotation cp="([^"]+)">([^<]*)<', text):
            found[html.unescape(characters)] = [word.strip() for word in html.unescape(words).split("|")]
    return found


def families(emoji: list[Emoji]) -> list[str]:
    """The family of each emoji, named by its first member: what differs in skin tone, gender or hair only is one family."""
    parent = {i: i for i in range(len(emoji))}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    seen: dict[str, int] = {}
    for i, one in enumerate(emoji):
        bare = GENDER_SIGN.sub("", SKIN_TONES.sub("", one.text.replace("\ufe0f", "")))
        head, colon, _ = one.name.partition(":")
        name = one.name if colon and head in NAMED_BY_WHAT_FOLLOWS else head
        name = NEUTRAL.get(name, name)
        for key in (PERSON.sub("\U0001f9d1", bare), GENDER_WORD.sub("", name) or name):
            a, b = root(i), root(seen.setdefault(key, i))
            parent[max(a, b)] = min(a, b)
    return [emoji[root(i)].name for i in range(len(emoji))]


def captions(one: Emoji) -> list[str]:
    """What one might call it: "red apple", "a red apple", "red apple, fruit", "fruit"."""
    name = one.name.replace(":", ",")
    words = [word for word in one.keywords if word not in name]
    said = [name]
    if one.category not in WITHOUT_ARTICLE and not re.search(r"[^s]s\b", name):
        said.append(f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}".replace(", ", " with ", 1))
    if words:
        said.append(", ".join([name, *words]))
    if len(one.keywords) > 1 and not SKIN_TONES.search(one.text):
        said.append(", ".join(one.keywords))
        said += words[:2]
    return list(dict.fromkeys(said))


def held_out(family: str, share: float) -> bool:
    digest = hashlib.sha256(family.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """The glyph on white, `size` pixels square. Raises ValueError where the font has no single glyph."""
    if not 0 < font.getlength(text) <= 136:
        raise ValueError(f"font: {FONT} has no single glyph for {text!r}")
    sheet = Image.new("RGB", (136, 136), "white")
    ImageDraw.Draw(sheet).text((0, 4), text, font=font, embedded_color=True)
    return sheet.resize((size, size), Image.Resampling.LANCZOS)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write")] = Path("emoji"),
    size: Annotated[int, typer.Option(min=8, help="Pixels")] = 64,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of families held out")] = 0.05,
    limit: Annotated[int | None, typer.Option(help="Only every n-th family, so that about so many emoji are left")] = None,
    text: Annotated[bool, typer.Option("--text", help="Also write the captions' features: needs bldm-kernels[text]")] = False,
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    names: Annotated[Path, typer.Option(help="emoji-test.txt")] = EMOJI,
    annotations: Annotated[Path, typer.Option(help="CLDR's folder common/")] = ANNOTATIONS,
) -> None:
    if not features.check("raqm"):
        raise SystemExit("emoji of several characters need a Pillow with raqm: Pillow's own wheels have it")
    loaded = ImageFont.truetype(str(font), GLYPH, layout_engine=ImageFont.Layout.RAQM)
    emoji = read_emoji(names, annotations)
    members = families(emoji)
    if limit is not None:
        order = sorted(set(members), key=lambda family: hashlib.sha256(b"limit" + family.encode()).digest())
        kept = set(order[: max(1, len(order) * limit // len(emoji))])
        emoji, members = zip(*(pair for pair in zip(emoji, members, strict=True) if pair[1] in kept), strict=True)
    tables: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    for one, family in zip(emoji, members, strict=True):
        split = "test" if held_out(family, share) else "train"
        (out / split).mkdir(parents=True, exist_ok=True)
        draw(one.text, loaded, size).save(out / split / one.file)
        about = {"name": one.name, "family": family, "category": one.category, "captions": captions(one)}
        tables[split][one.file] = about
    for split, table in tables.items():
        (out / split / "captions.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if text:
        from bldm.data import read_captions
        from bldm.training.conditions import caption_features, features_file

        for split in tables:
            caption_features(list(read_captions(out / split).values()), features_file(out / split, tokens=False))
    count = len({about["family"] for about in tables["test"].values()})
    (out / "README.md").write_text(SOURCES.format(train=len(tables["train"]), test=len(tables["test"]), families=count))
    print(f"{out}: {len(tables['train'])} pictures to train on, {len(tables['test'])} held out ({count} families)")


if __name__ == "__main__":
    typer.run(main)
