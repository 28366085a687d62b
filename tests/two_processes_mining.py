"""One of several processes that mine candidates, on one CPU device each; prints what it found.

python tests/two_processes_mining.py PORT NUM_PROCESSES PROCESS_ID MODELS COLLECTION
"""

import json
import sys
from pathlib import Path

from jaxsearch.data.sources import load_collection
from jaxsearch.data.verticals import load_vertical
from jaxsearch.encoder import load_encoder
from train.first_stage import open_first_stage
from train.processes import join


def main(port: str, num_processes: str, process_id: str, models: str, folder: str) -> None:
    join(f"127.0.0.1:{port}", int(num_processes), int(process_id))
    collection = load_collection(folder)
    vertical, encoder = load_vertical(Path(models, "vertical")), load_encoder(Path(models, "encoder"))
    stage = open_first_stage(collection, vertical, encoder, view="short")
    print(json.dumps(stage.mine(collection.split("test")[:3], depth=5)))


if __name__ == "__main__":
    main(*sys.argv[1:])
