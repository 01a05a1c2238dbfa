"""A recipe's command, which also writes down what each training step saw.

    python hashed.py FILE RECIPE.yaml [--option value ...]

Each line of FILE is a process, a step and the hash of one of its micro-batches.
"""

import hashlib
import sys

import pretrain

FILE, *COMMAND = sys.argv[1:]


class Hashed(pretrain.RecipeTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(inputs[name].cpu().numpy().tobytes())
        with open(FILE, "a") as file:
            file.write(f"{self.args.process_index} {self.state.global_step} {digest.hexdigest()}\n")
        return super().training_step(model, inputs, *args, **kwargs)


pretrain.RecipeTrainer = Hashed
sys.exit(pretrain.run(COMMAND))
