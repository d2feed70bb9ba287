"""The emoji data set: which emoji belong together, what they are called, and the folder that training reads."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bldm.data import load_images, read_captions
from PIL import Image, ImageFont

SCRIPT = Path(__file__).parent.parent / "examples" / "emoji" / "make_dataset.py"
NAMES = """# group: People & Body
1F468 200D 1F680 ; fully-qualified # x E4.0 man astronaut
1F469 200D 1F680 ; fully-qualified # x E4.0 woman astronaut
1F9D1 200D 1F680 ; fully-qualified # x E12.1 astronaut
1F9D1 1F3FB 200D 1F680 ; fully-qualified # x E12.1 astronaut: light skin tone
1F64B 200D 2642 FE0F ; fully-qualified # x E4.0 man raising hand
1F64B 200D 2642 ; minimally-qualified # x E4.0 man raising hand
1F64B ; fully-qualified # x E0.6 person raising hand
1F474 ; fully-qualified # x E0.6 old man
1F475 1F3FF ; fully-qualified # x E1.0 old woman: dark skin tone
1F468 200D 1F466 ; fully-qualified # x E4.0 family: man, boy
1F469 200D 1F467 ; fully-qualified # x E4.0 family: woman, girl
# group: Food & Drink
1F34E ; fully-qualified # x E0.6 red apple
1F347 ; fully-qualified # x E0.6 grapes
# group: Flags
1F1EF 1F1F5 ; fully-qualified # x E2.0 flag: Japan
1F1EB 1F1F7 ; fully-qualified # x E2.0 flag: France
"""
KEYWORDS = """<ldml><annotations>
<annotation cp="&#x1F34E;">apple | fruit | red</annotation>
<annotation cp="&#x1F34E;" type="tts">red apple</annotation>
<annotation cp="&#x1F64B;&#x200D;&#x2642;">gesture | happy</annotation>
</annotations></ldml>"""


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_dataset", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_dataset"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


make_dataset = script()


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    names = tmp_path / "emoji-test.txt"
    names.write_text(NAMES, encoding="utf-8")
    for folder, text in (("annotations", KEYWORDS), ("annotationsDerived", "<ldml></ldml>")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "en.xml").write_text(text, encoding="utf-8")
    return {"names": names, "annotations": tmp_path}


def test_only_fully_qualified_emoji_with_their_keywords(sources: dict[str, Path]) -> None:
    emoji = make_dataset.read_emoji(*sources.values())
    assert len(emoji) == 14 and emoji[0].name == "man astronaut" and emoji[0].category == "People & Body"
    by_name = {one.name: one for one in emoji}
    assert by_name["red apple"].text == "\U0001f34e" and by_name["red apple"].keywords == ["apple", "fruit", "red"]
    assert by_name["man raising hand"].keywords == ["gesture", "happy"]  # CLDR leaves the variation selector out
    assert by_name["flag: Japan"].file == "1f1ef-1f1f5.png"


def test_variants_are_one_family(sources: dict[str, Path]) -> None:
    emoji = make_dataset.read_emoji(*sources.values())
    found: dict[str, set[str]] = {}
    for one, family in zip(emoji, make_dataset.families(emoji), strict=True):
        found.setdefault(family, set()).add(one.name)
    assert list(found.values()) == [
        {"man astronaut", "woman astronaut", "astronaut", "astronaut: light skin tone"},
        {"man raising hand", "person raising hand"},
        {"old man", "old woman: dark skin tone"},
        {"family: man, boy", "family: woman, girl"},
        {"red apple"},
        {"grapes"},
        {"flag: Japan"},
        {"flag: France"},
    ]


def test_captions(sources: dict[str, Path]) -> None:
    said = {one.name: make_dataset.captions(one) for one in make_dataset.read_emoji(*sources.values())}
    assert said["red apple"] == ["red apple", "a red apple", "red apple, fruit", "apple, fruit, red", "fruit"]
    assert said["astronaut: light skin tone"] == ["astronaut, light skin tone", "an astronaut with light skin tone"]
    assert said["grapes"] == ["grapes"] and said["flag: Japan"] == ["flag, Japan"]  # no article


def test_the_folder_it_writes(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the drawing: whole families are held out, the same ones every time, and training can read the rest."""
    colours = iter(range(10**6))
    monkeypatch.setattr(make_dataset.features, "check", lambda name: True)  # a Pillow without raqm will do
    monkeypatch.setattr(ImageFont, "truetype", lambda *args, **kwargs: None)
    monkeypatch.setattr(make_dataset, "draw", lambda text, font, size: Image.new("RGB", (size, size), (next(colours), 0, 0)))
    for out in ("one", "other"):
        make_dataset.main(tmp_path / out, size=16, share=0.4, limit=None, text=False, font=tmp_path, **sources)
    train, test = (json.loads((tmp_path / "one" / split / "captions.json").read_text()) for split in ("train", "test"))
    assert len(train) + len(test) == 14 and train and test
    assert not {about["family"] for about in train.values()} & {about["family"] for about in test.values()}
    for split in ("train", "test"):
        one, other = (tmp_path / out / split / "captions.json" for out in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    data = load_images(tmp_path / "one", "test", image_size=16)
    assert data.images.shape == (len(test), 3, 16, 16) and data.labels is None
    assert data.captions == list(read_captions(tmp_path / "one" / "test").values()) == [a["captions"] for a in test.values()]
    assert data.first(1).captions == data.captions[:1] and len(data.first(1)) == 1
    assert "Open Font License" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.skipif(not make_dataset.FONT.is_file(), reason="needs the Debian package fonts-noto-color-emoji")
def test_glyphs_are_drawn_whole() -> None:
    font = ImageFont.truetype(str(make_dataset.FONT), make_dataset.GLYPH, layout_engine=ImageFont.Layout.RAQM)
    apple, astronaut = (make_dataset.draw(text, font, 64) for text in ("\U0001f34e", "\U0001f469\u200d\U0001f680"))
    for picture in (apple, astronaut):
        assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = apple.getpixel((32, 40))  # type: ignore[misc]
    assert red > 150 > 100 > max(green, blue)
    with pytest.raises(ValueError, match="font: .* has no single glyph for 'xyz"):
        make_dataset.draw("xyz" * 9, font, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "captions.json: expected .*JSONDecodeError"),
        ("[]", "captions.json: expected .*AttributeError"),
        ('{"a.png": ["x"]}', "captions.json: expected .*TypeError"),
        ('{"a.png": {"name": "x"}}', "captions.json: expected .*KeyError: 'captions'"),
        ('{"a.png": {"captions": []}}', "captions.json: expected pictures with one caption at least each"),
        ('{"a.png": {"captions": ["x"]}}', "a.png is not a readable picture"),
    ],
)
def test_broken_folders_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, image_size=8)
