"""`python -m dspark`, which is how torchrun starts it."""

import sys

from dspark.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
