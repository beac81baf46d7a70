"""`python -m userdiff`."""

import sys

from userdiff.cli import main

sys.exit(main())
