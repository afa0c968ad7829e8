"""The refusal case study; ``--help`` lists the options, without any it uses the tiny model."""

import sys

from saefeat.studies.refusal.cli import main

if __name__ == "__main__":
    sys.exit(main())
