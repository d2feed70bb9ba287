"""`bldm.profile`: where the time of sampling and decoding goes."""

from .measure import profile
from .result import Phase, Profile, Row

__all__ = ["Phase", "Profile", "Row", "profile"]
