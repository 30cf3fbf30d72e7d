"""As ``worker.local``, with workers that play the devices of a described cluster; ``emulation.emulator`` starts it."""

from flowspec.emulation.paced import paced_worker
from flowspec.worker.local import main

if __name__ == "__main__":
    main(paced_worker)
