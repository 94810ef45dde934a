"""
Render the Mermaid sources beside this file to SVG, for pages that are read without a network.

    npm install --prefix /tmp/mermaid @mermaid-js/mermaid-cli   # PUPPETEER_SKIP_DOWNLOAD=1 where Chromium is installed
    python docs/assets/render_diagrams.py /tmp/mermaid/node_modules/.bin/mmdc /usr/bin/chromium

Each SVG ends with the hash of its source, by which a test sees one that was not rendered again.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path


ASSETS = Path(__file__).parent


def source_hash(source: Path) -> str:
    """BLAKE2b of a source, 16 hexadecimal digits."""
    return hashlib.blake2b(source.read_bytes(), digest_size=8).hexdigest()


def main(renderer: str, browser: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as options:
        json.dump({"executablePath": browser, "args": ["--no-sandbox"]}, options)
        options.flush()
        for source in sorted(ASSETS.glob("*.mmd")):
            target = source.with_suffix(".svg")
            command = [renderer, "-i", str(source), "-o", str(target), "-p", options.name, "-b", "white"]
            subprocess.run(command, check=True)
            target.write_text(f"{target.read_text().rstrip()}\n<!-- source {source_hash(source)} -->\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
