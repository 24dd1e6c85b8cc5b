"""`python -m vlahub` is the `vlahub` command."""

import sys

from vlahub.cli import main

sys.exit(main())
