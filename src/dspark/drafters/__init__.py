"""Whatever proposes tokens, one file each, all with `start / draft / commit` (core.decode.Drafter)."""

from dspark.drafters.arbiter import Arbiter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.lookup import PromptLookup
from dspark.drafters.mtp import MtpDrafter
from dspark.drafters.none import NoDrafter
from dspark.drafters.seeded import SeededDrafter

__all__ = ["Arbiter", "DSparkDrafter", "MtpDrafter", "NoDrafter", "PromptLookup", "SeededDrafter"]
