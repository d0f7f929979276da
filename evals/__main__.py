"""`python -m evals`, see `evals.command`."""

import sys

from pydantic_ai.exceptions import UserError

try:
    from evals.command import main
except UserError as error:  # the services look up their model when they are imported
    sys.stderr.write(f"Error: {error}\n")
    sys.exit(2)

sys.exit(main())
