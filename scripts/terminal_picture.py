"""Draw docs/fits.svg: what `finefit fits rtx-4090` prints in a terminal of 100 columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 100


def main() -> None:
    """Run the command and write the picture."""
    command = ["finefit", "fits", "rtx-4090"]
    environment = {"COLUMNS": str(COLUMNS), "PATH": str(Path(sys.executable).parent)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(Text(f"$ {' '.join(command)}\n", style="bold"), Text(output), sep="")
        console.save_svg("docs/fits.svg", title="finefit", unique_id="fits")


if __name__ == "__main__":
    main()
