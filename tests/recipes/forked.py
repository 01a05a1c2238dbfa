"""Commands of pretrain.py, each in a fork of this process, so that all that they import is imported once.

    accelerate launch ... forked.py '[{"argv": ["recipe.yaml", ...], "folder": "...", "port": 12345}]'

Each leaves what it printed in its folder, by process.
"""

import json
import os
import sys
import traceback

import datasets

import pretrain

for told in json.loads(sys.argv[1]):
    # The launcher's own store knows the processes of the first command.
    os.environ |= {"MASTER_PORT": str(told["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    if (child := os.fork()) == 0:
        with open(f"{told['folder']}/printed.{os.environ['RANK']}", "w") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        datasets.config.HF_DATASETS_CACHE = f"{told['folder']}/cache"
        sys.argv[1:] = told["argv"]
        code = 1
        try:
            code = pretrain.run(told["argv"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)  # the launcher then ends the others
