"""What is hidden of a command, and what is not."""

import pytest

from hf_warmup.trainer.secrets import hide_known, hide_secrets

HUB = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3h"
KEY = "0123456789abcdef" * 2 + "01234567"  # 40 digits, as W&B's
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"

BY_NAME = [
    ["--hub_token", "xyzzy"],
    ["--hub_token=xyzzy"],
    ["--hub-token", "xyzzy"],
    ["hub_token=xyzzy"],
    ["trainer.hub_token=xyzzy"],
    ["+trainer.hub_token=xyzzy"],
    ["--wandb.api-key=xyzzy"],
    ["--HUB_TOKEN", "xyzzy"],
    ["--Token", "xyzzy"],
    ["--hubToken=xyzzy"],
    ["--authtoken", "xyzzy"],
    ["--passwd", "xyzzy"],
    ["--password=xyzzy, xyzzy"],
    ["--auth", "xyzzy"],
    ["--pat", "xyzzy"],
    ["--credentials", "xyzzy"],
    ["--tokens", "xyzzy", "xyzzy"],
    ["--token_value", "xyzzy"],
    ["--model_api_key", "xyzzy"],
    ["--client_secret", "xyzzy"],
    ["--env", "HF_TOKEN=xyzzy"],
    ["env.AWS_SECRET_ACCESS_KEY=xyzzy"],
    ["--args", '{"hub_token": "xyzzy"}'],
    ["--args", '{"a": {"tokens": ["xyzzy", "xyzzy"]}, "b": 1}'],
    ["--args", '{\\"password\\": \\"xyzzy\\"}'],
    ["--args", "{'password': 'xy,xyzzy'}"],
    ["--args", "{token: xyzzy}"],
    ["--header", "Authorization: Bearer xyzzy"],
    ["--header", "X-Api-Key: xyzzy"],
    ["Bearer", "xyzzy"],
    ["https://host/x?a=b&access_token=xyzzy&c=d"],
    ["https://user:xyzzy@host/x"],
    ["postgresql://user:xy@xyzzy@host/db"],
]
BY_FORM = [
    ["-t", HUB],
    ["--t=" + HUB],
    [HUB],
    ["--run_name", "x-" + HUB],
    ["--output_dir", f"runs/{HUB}/x"],
    ["--x", '["' + HUB + '"]'],
    [f"https://{HUB}@huggingface.co/x"],
    ["--x", "api_org_" + HUB[3:]],
    ["--x", "sk-proj-" + HUB],
    ["--x", "ghp_" + HUB[3:]],
    ["--x", "github_pat_11ABC_" + HUB[3:]],
    ["--x", "glpat-" + HUB[3:]],
    ["--x", "AKIAIOSFODNN7EXAMPLE"],
    ["--x", "xoxb-123456789012-abcdefghij"],
    ["--x", "AIza" + HUB],
    ["--x", KEY],
    ["--run_name", "x-" + KEY],
    ["--x", JWT],
    ["-k", "abc123def456ghi789jkl"],
]
INNOCENT = [
    ["--add_eos_token", "--tokenizer", "x"],
    ["--pad_token", "abc"],
    ["--eos_token=<|im_end|>"],
    ["--num_tokens", "5"],
    ["--token_count", "5"],
    ["--max_new_tokens", "x"],
    ["--tokens_per_step=4096"],
    ["--tokenizer", "gpt2"],
    ["--token", "true"],
    ["--token_file", "/home/me/file"],
    ["--label_key", "label"],
    ["--num_key_value_heads", "4"],
    ["--author", "me"],
    ["--patience", "3"],
    ["--model", '{"model_type": "llama", "pad_token_id": 3, "eos_token": "x"}'],
    ["--model_revision", KEY],
    ["--model", f"/cache/snapshots/{KEY}/"],
    ["--run_name", "hf_warmup-sk-learn"],
    ["-t", "runs/2026/a"],
    ["-p", "29500"],
    ["--prompt", "To be: or not"],
    ["ssh://git@github.com/x"],
]


@pytest.mark.parametrize("words", BY_NAME + BY_FORM, ids=lambda words: " ".join(words)[:40])
def test_a_secret_is_hidden_and_nothing_behind_it(words):
    command = ["train.py", "--lr", "3e-4", *words, "--lr", "3e-4"]
    shown = hide_secrets(command)
    assert not [word for word in shown if any(s in word for s in ("xyzzy", HUB[3:], KEY, JWT, "AKIA", "xoxb", "ghi"))]
    assert shown[:3] == command[:3]
    assert shown[-2:] == command[-2:]
    assert len(shown) == len(command)
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize("words", INNOCENT, ids=lambda words: " ".join(words)[:40])
def test_what_is_no_secret_stays(words):
    assert hide_secrets(["train.py", *words]) == ["train.py", *words]


@pytest.mark.parametrize("word", [words[-1] for words in BY_FORM[:-1]])
def test_a_text_shows_no_secret_of_a_known_form(word):
    shown = hide_known(f"# The run {word} of today")
    assert shown.startswith("# The run ")
    assert shown.endswith(" of today")
    assert not any(secret in shown for secret in (HUB[3:], KEY, JWT, "AKIA", "xoxb"))
