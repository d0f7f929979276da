"""The command line: `durable dev`, `durable server`, `durable serve`."""

import sys
from durable.worker import serve


def main() -> int:
    serve(sys.argv[2], port=int(sys.argv[4]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
