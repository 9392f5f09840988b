"""``python -m sbi_slotflow.cli`` is ``sbi-slotflow``."""

from . import script

if __name__ == "__main__":
    script()
