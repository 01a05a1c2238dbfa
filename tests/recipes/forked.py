"""Commands of pretrain.py, each in a fork of this process, so that all that they import is imported once.

    accelerate launch ... forked.py '[{"argv": ["recipe.yaml", ...], "folder": "...", "port": 12345}]'

Each leaves what it printed in its folder, by process.
"""

import json
import os
import sys

import datasets
from forking import in_fork

import pretrain


def run(argv, folder):
    with open(f"{folder}/printed.{os.environ['RANK']}", "w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
    sys.argv[1:] = argv
    return pretrain.run(argv)


for told in json.loads(sys.argv[1]):
    in_fork(told["port"], lambda told=told: run(told["argv"], told["folder"]))
