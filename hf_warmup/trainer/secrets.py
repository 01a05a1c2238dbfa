"""A command and other words without the secrets in them: tokens, keys and passwords.

A secret is known by the name of its option, however that is spelled, or by its own form. By the name alone, `token`
may be a secret or a part of a text, and `key` one or a column: names that say so, and values that are numbers, true
or false or the special tokens of a text, stay. What is hidden becomes `...`, and hiding twice changes nothing more.
"""

import re
from collections.abc import Sequence

_HIDDEN = "..."

# Parts of a name that make its value a secret, whatever else is in it.
_SURE = re.compile(
    r"(?:^|_)(?:[a-z]*(?:secret|password|passphrase|passwd|credential)s?|auth|authorization|bearer|pats?|pwds?|pw|"
    r"(?:access|account|anthropic|api|auth|aws|encryption|gh|github|gitlab|hf|hub|openai|private|refresh|secret|"
    r"signing|slack|ssh|wandb)_?(?:key|token)s?)(?![a-z])"
)
# Words of which it depends on the others.
_PERHAPS = re.compile(r"\w*tokens?|toks?|keys?|pass")
# Token or key of what then is none.
_NONE = re.compile(
    r"add|answer|audio|begin|bos|budget|cache|class|cls|columns?|completion|counts?|decoder|draft|dtype|embeddings?|"
    r"encoder|end|eos|every|extra|features?|field|first|forced|foreign|generated|group|heads?|ids?|ignore|images?|"
    r"index|inputs?|labels?|last|len|length|limit|logits|loss|mask|max|maximum|mean|merge|metric|min|minimum|new|num|"
    r"number|outputs?|pad|per|position|predict|prediction|primary|prompt|public|query|question|rate|ratio|replace|"
    r"response|seen|sep|seq|sequence|size|skip|sort|special|start|stop|suppress|target|text|thinking|through|total|"
    r"train|truncate|types?|unk|video|vocab|weights?|window|words?"
)
# Where a secret is looked for is none.
_PLACE = re.compile(r"(?:^|_)(?:file|path|dir|env)(?![a-z])")
# Values that no token and no key has.
_PLAIN = re.compile(
    r"[-+]?[\d_.,]*(?:e[-+]?\d+)?|true|false|yes|no|none|null|auto|<[^<>]{0,40}>|\[[A-Za-z_]{0,20}\]", re.IGNORECASE
)
# Names of options whose 40 digits are a version, as W&B's key has them.
_VERSION = re.compile(r"revision|commit|sha|hash|version|ref|branch|checksum|digest", re.IGNORECASE)

# Secrets by their own form.
_FORMS = re.compile(
    "|".join(
        [
            r"(?:hf|api_org)_[A-Za-z0-9]{16,}",  # the hub
            r"(?<![A-Za-z0-9])sk-[\w-]*?[A-Za-z0-9]{16,}[\w-]*",  # OpenAI, Anthropic
            r"(?<![A-Za-z0-9])[sr]k_(?:live|test)_\w{10,}",  # Stripe
            r"gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
            r"gl[a-z]{2,6}-[\w-]{16,}",  # GitLab
            r"(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{12,}",  # AWS
            r"(?<![A-Za-z0-9])(?:xox[a-z]|xapp)-[\w-]{8,}",  # Slack
            r"AIza[\w-]{24,}|ya29\.[\w-]{16,}|GOCSPX-[\w-]{16,}",  # Google
            r"(?<![A-Za-z0-9])(?:r8|gsk|npm|tgp_v1|dop_v1|wandb_v1)_\w{20,}",
            r"(?<![A-Za-z0-9])(?:pypi|nvapi|xai|pplx|dapi)-?[A-Za-z0-9_-]{28,}",
            r"(?<![A-Za-z0-9])eyJ[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*)?",  # JWT
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
        ]
    )
)
# W&B's key; in a path or behind an @ it is a commit.
_WANDB = re.compile(r"(?<![A-Za-z0-9/@])[0-9a-f]{40}(?![A-Za-z0-9/])")
# A user and a password, or a long name that can only be a token, in a URL; the last @ before the path ends them.
_LOGIN = re.compile(r"(://)(?:[^\s/@:]*:[^\s/]*|[^\s/@:]{16,})@")
_BEARER = re.compile(r"(\bbearer\s+)[^\s\"'\\]+", re.IGNORECASE)

# A name and its value inside a word, as JSON, YAML, headers, environments and queries write them.
_VALUE = r"""\[[^\]]*\]|\\?"(?:\\.|[^"\\])*\\?"|'[^']*'|(?:(?:bearer|basic|token|digest)\s+)?[^\s,;&"'}\]\\]+"""
_PAIR = re.compile(rf"""([\w.\-]+)(\\*["']?\s*[:=]\s*)({_VALUE})""", re.IGNORECASE)


def hide_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command, as in `sys.argv`, with `...` in the place of its secrets."""
    shown: list[str] = []
    name, many = "", False  # the option whose value is next, and whether it may take several
    for word in words:
        option = re.match(r"--?([A-Za-z][\w.\-]*)(=|$)", word) if re.match(r"--|-[A-Za-z](=|$)", word) else None
        if option is None and name and _is_secret(name, word):
            shown.append(_HIDDEN)
            name = name if many else ""
            continue
        shown.append(_hide_in_word(word, name))
        name = option[1] if option and not option[2] else "bearer" if word.lower() == "bearer" else ""
        many = name.endswith("s")
    return shown


def hide_known(text: str) -> str:
    """The text with `...` in the place of what has the form of a secret, whatever it is called."""
    text = _LOGIN.sub(rf"\1{_HIDDEN}@", _FORMS.sub(_HIDDEN, text))
    return _BEARER.sub(rf"\1{_HIDDEN}", _WANDB.sub(_HIDDEN, text))


def _hide_in_word(word: str, name: str) -> str:
    whole = re.match(r"(-*[\w.\-/]*[A-Za-z][\w.\-]*)=(.*)", word, re.DOTALL)
    if whole and _is_secret(whole[1], whole[2]):
        return f"{whole[1]}={_HIDDEN}"
    if _VERSION.search(whole[1] if whole else name):
        return _FORMS.sub(_HIDDEN, word)
    return hide_known(_PAIR.sub(_hide_pair, word))


def _hide_pair(pair: re.Match[str]) -> str:
    name, between, value = pair.groups()
    if not _is_secret(name, value.strip("\\\"'")):
        # What looks like a value may itself begin with a name.
        return name + between + _PAIR.sub(_hide_pair, value)
    quote = re.match(r"\\?[\"']?", value)
    mark = quote[0] if quote else ""
    return f"{name}{between}{mark}{_HIDDEN}{mark}"


def _is_secret(option: str, value: str) -> bool:
    """Whether an option of that name takes secrets, of which this may be one."""
    last = option.strip("-").replace("/", ".").rsplit(".", 1)[-1]
    if len(last) == 1:  # -t, -k, -p: of anything
        return last in "tkp" and _looks_random(value)
    if re.fullmatch(r"(?:true|false|none|null|\.\.\.)?", value, re.IGNORECASE):
        return False
    spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", last).lower()
    if _PLACE.search(spelled):
        return False
    if _SURE.search(spelled):
        return True
    words = spelled.split("_")
    perhaps = any(map(_PERHAPS.fullmatch, words)) and not any(map(_NONE.fullmatch, words))
    return perhaps and not _PLAIN.fullmatch(value)


def _looks_random(value: str) -> bool:
    return bool(re.fullmatch(r"(?=.*[A-Za-z])(?=.*\d)[\w+/=-]{20,}", value)) and value.count("/") < 2
