import dataclasses
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_warmup.trainer import WarmupArguments, WarmupCallback, WarmupTrainingArguments
from hf_warmup.trainer.arguments import GONE

from tiny import start_of


def test_every_option_has_help_and_help_renders():
    assert all(f.metadata.get("help") for f in dataclasses.fields(WarmupArguments))
    # A bare % in a help string only fails when --help is asked for.
    assert "least 5% of the run" in " ".join(HfArgumentParser(WarmupArguments).format_help().split())


def test_flags_are_parsed_beside_the_trainers_and_in_one_class():
    flags = ["--output_dir", "x", "--gi_adam", "--init_lr", "1e-5", "--warmup_card", "False", "--use_cpu"]
    args, warmup = HfArgumentParser([TrainingArguments, WarmupArguments]).parse_args_into_dataclasses(flags)
    (both,) = HfArgumentParser(WarmupTrainingArguments).parse_args_into_dataclasses(flags)
    for parsed in (warmup, both):
        assert (parsed.gi_adam, parsed.fixed_init_lr, parsed.warmup_card) == (True, 1e-5, False)
        assert parsed.ramp_steps is None
    assert args.output_dir == both.output_dir == "x"
    assert both.to_dict()["init_lr"] == "1e-5"


def test_a_number_of_ramp_steps_is_parsed():
    (warmup,) = HfArgumentParser(WarmupArguments).parse_args_into_dataclasses(["--ramp_steps", "30"])
    assert warmup.ramp_steps == 30.0


def test_defaults_ask_for_nothing_but_a_warmup_and_its_card():
    warmup = WarmupArguments()
    assert dataclasses.asdict(warmup) == {
        "warmup": "auto",
        "auto_lr": False,
        "init_lr": "auto",
        "ramp_steps": None,
        "gi_adam": False,
        "warmup_card": True,
    }
    assert warmup.fixed_init_lr is None


@pytest.mark.parametrize("warmup", ["auto", "linear", "guided", "persistent", "none"])
@pytest.mark.parametrize("warmup_steps", [0, 6, 0.1])
def test_auto_is_linear_with_warmup_steps_and_guided_without(warmup, warmup_steps):
    meant = ("linear" if warmup_steps else "guided") if warmup == "auto" else warmup
    assert WarmupArguments(warmup=warmup).kind(warmup_steps) == meant


BAD = [
    ({"init_lr": "banana"}, "init_lr must be `auto`, `catapult` or a positive number, got 'banana'"),
    ({"init_lr": "zero"}, "init_lr must be .* got 'zero': for the Trainer's own schedule set warmup=none"),
    ({"init_lr": "-1e-3"}, "init_lr must be .* got '-1e-3'"),
    ({"init_lr": 0.0}, "init_lr must be .* got 0.0"),
    ({"init_lr": "inf"}, "init_lr must be .* got 'inf'"),
    ({"init_lr": True}, "init_lr must be .* got True"),
    ({"warmup": "exponential"}, "warmup must be auto, linear, guided, persistent or none, got 'exponential'"),
    # As YAML reads 1e2.
    ({"ramp_steps": "1e2"}, "ramp_steps must be a number, got '1e2'"),
    ({"ramp_steps": 0}, "ramp_steps must be positive and finite, got 0.0"),
    ({"ramp_steps": float("inf")}, "ramp_steps must be positive and finite, got inf"),
    ({"auto_lr": "yes"}, "auto_lr must be .* got 'yes'"),
    ({"auto_lr": True, "warmup": "linear"}, "auto_lr must be off with warmup=linear, got True: only guided warmup"),
    ({"auto_lr": True, "warmup": "persistent"}, "auto_lr must be off with warmup=persistent"),
    ({"auto_lr": True, "warmup": "none"}, "auto_lr must be off with warmup=none"),
    ({"ramp_steps": 9, "warmup": "linear"}, "ramp_steps must be left out with warmup=linear, got 9.0"),
    ({"ramp_steps": 9, "warmup": "none"}, "ramp_steps must be left out with warmup=none, got 9.0"),
    ({"warmup": "guided", "init_lr": "1e-4"}, "init_lr must be left out with warmup=guided, got '1e-4'"),
    ({"warmup": "none", "init_lr": "catapult"}, "init_lr must be left out with warmup=none, got 'catapult'"),
    ({"warmup": "persistent", "init_lr": "catapult"}, "init_lr must be auto or a number with warmup=persistent"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_named_with_their_option(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupArguments(**options)
    with pytest.raises(ValueError, match=message):
        WarmupTrainingArguments(output_dir="x", use_cpu=True, **options)


def test_bad_values_of_a_mixin_in_the_other_order_are_refused_by_attach(make_trainer):
    @dataclasses.dataclass
    class Backwards(TrainingArguments, WarmupArguments):
        pass

    trainer = make_trainer(args_cls=Backwards, init_lr="banana")
    with pytest.raises(ValueError, match="got 'banana'"):
        WarmupCallback.attach(trainer)


NOT_OPTIONS = [
    ("warmpu", "got warmpu; did you mean warmup?"),
    ("autolr", "got autolr; did you mean auto_lr?"),
    ("ramp", "got ramp"),
    ("line_steps", "got line_steps; did you mean ramp_steps?"),
    ("lr", "the options are warmup, auto_lr, init_lr, ramp_steps, gi_adam, warmup_card, got lr"),
    ("learning_rate", "learning_rate is an option of the Trainer's: set it in TrainingArguments"),
    ("warmup_steps", "warmup_steps is an option of the Trainer's: set it in TrainingArguments"),
    *((name, f"{name} is no option any more: {advice}") for name, advice in GONE.items()),
]


@pytest.mark.parametrize(("name", "words"), NOT_OPTIONS)
def test_an_option_that_there_is_not_is_refused_with_the_one_that_is_meant(make_trainer, name, words):
    trainer = make_trainer(args_cls=TrainingArguments)
    with pytest.raises(ValueError, match="^") as error:
        WarmupCallback.attach(trainer, **{name: 1})
    assert words in str(error.value)
    assert WarmupCallback.attach(trainer)  # nothing is left of the one that was refused


def test_what_old_names_advise_is_an_option_or_a_callback():
    options = {f.name for f in dataclasses.fields(WarmupArguments)}
    used = {match[1] for advice in GONE.values() if (match := re.match(r"use (\w+)", advice))}
    assert used == {"auto_lr", "ramp_steps", "warmup", "init_lr", "SharpnessCallback"}
    assert used - {"SharpnessCallback"} <= options


def test_options_may_be_given_by_name_to_attach(make_trainer):
    trainer = make_trainer(args_cls=TrainingArguments, warmup_steps=0, max_steps=40, vocab=5)
    callback = WarmupCallback.attach(trainer, warmup="guided", auto_lr=True, ramp_steps=5, warmup_card=False)
    trainer.train()
    assert start_of(trainer)["warmup/mode"] == callback.rule.kind == "guided"
    assert start_of(trainer)["warmup/auto_lr"] is True
    assert (callback.rule.ramp_steps, callback.rule.learning_rate) == (5, None)


@pytest.mark.parametrize("args_cls", [TrainingArguments, WarmupTrainingArguments])
def test_options_of_attach_take_the_place_of_those_of_the_trainer(make_trainer, args_cls):
    own = {"init_lr": "1e-5"} if args_cls is WarmupTrainingArguments else {}
    trainer = make_trainer(args_cls=args_cls, **own)
    WarmupCallback.attach(trainer, init_lr=2e-5)
    trainer.train()
    assert start_of(trainer)["warmup/init_lr"] == 2e-5
    if own:
        WarmupCallback.attach(trainer := make_trainer(args_cls=args_cls, **own))
        trainer.train()
        assert start_of(trainer)["warmup/init_lr"] == 1e-5


@pytest.mark.parametrize("given", [{"warmup": "none"}, "guided", 3], ids=str)
def test_what_is_no_warmup_arguments_is_refused(make_trainer, given):
    with pytest.raises(ValueError, match="arguments must be a WarmupArguments, or options by name, got "):
        WarmupCallback.attach(make_trainer(), given)


def test_options_beside_arguments_take_the_place_of_those_alone(make_trainer):
    given = WarmupArguments(init_lr="1e-5", warmup_card=False)
    callback = WarmupCallback.attach(make_trainer(args_cls=TrainingArguments), given, init_lr=2e-5)
    assert (callback.arguments.init_lr, callback.arguments.warmup_card) == (2e-5, False)
    assert given.init_lr == "1e-5"
    with pytest.raises(ValueError, match="auto_lr must be off with warmup_steps=6"):
        WarmupCallback.attach(make_trainer(), WarmupArguments(), auto_lr=True)
