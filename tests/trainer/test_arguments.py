import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_warmup.trainer import WarmupArguments, WarmupTrainingArguments


def test_every_option_has_help_and_help_renders():
    assert all(f.metadata.get("help") for f in dataclasses.fields(WarmupArguments))
    # A bare % in a help string only fails when --help is asked for.
    assert "6.25%" in HfArgumentParser(WarmupArguments).format_help()


def test_flags_are_parsed_beside_the_trainers_and_in_one_class():
    flags = ["--output_dir", "x", "--gi_adam", "--init_lr", "1e-5", "--max_init_fraction", "1.0", "--use_cpu"]
    args, warmup = HfArgumentParser([TrainingArguments, WarmupArguments]).parse_args_into_dataclasses(flags)
    (both,) = HfArgumentParser(WarmupTrainingArguments).parse_args_into_dataclasses(flags)
    for parsed in (warmup, both):
        assert (parsed.gi_adam, parsed.fixed_init_lr, parsed.max_init_fraction) == (True, 1e-5, 1.0)
    assert args.output_dir == both.output_dir == "x"
    assert both.to_dict()["init_lr"] == "1e-5"


def test_defaults_are_the_papers_but_for_the_cap_and_gi_adam():
    warmup = WarmupArguments()
    assert warmup.gi_adam is False
    assert warmup.init_lr == "catapult"
    assert warmup.fixed_init_lr is None
    assert (warmup.max_init_fraction, warmup.catapult_delta, warmup.critical_lr_rtol) == (0.1, 0.1, 0.0625)


BAD = [
    ({"init_lr": "banana"}, "init_lr must be `catapult`, `zero` or a positive number, got 'banana'"),
    ({"init_lr": "-1e-3"}, "init_lr must be .* got '-1e-3'"),
    ({"init_lr": 0.0}, "init_lr must be .* got 0.0"),
    ({"init_lr": "inf"}, "init_lr must be .* got 'inf'"),
    ({"max_init_fraction": 0.0}, "max_init_fraction must be above 0 and at most 1, got 0.0"),
    ({"max_init_fraction": 1.5}, "max_init_fraction must be .* got 1.5"),
    ({"critical_lr_method": "newton"}, "critical_lr_method must be secant or paper, got 'newton'"),
    ({"search_batches": 0}, "search_batches must be at least 1, got 0"),
    ({"catapult_delta": -0.1}, "catapult_delta must be positive and finite, got -0.1"),
    ({"critical_lr_rtol": float("nan")}, "critical_lr_rtol must be positive and finite, got nan"),
    # As YAML reads 1e-2.
    ({"warmup_growth": "1e-2"}, "warmup_growth must be a number, got '1e-2'"),
    ({"warmup_growth": None}, "warmup_growth must be a number, got None"),
    ({"sharpness_every": float("nan")}, "sharpness_every must be a whole number, got nan"),
    ({"search_batches": 1.5}, "search_batches must be a whole number, got 1.5"),
    ({"auto_lr": True}, "auto_lr must be off with warmup=linear, got True: only guided finds one"),
    ({"warmup": "guided", "init_lr": "1e-4"}, "init_lr must be left out with warmup=guided, got '1e-4'"),
    ({"init_lr": True}, "init_lr must be .* got True"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_named_with_their_option(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupArguments(**options)
    with pytest.raises(ValueError, match=message):
        WarmupTrainingArguments(output_dir="x", use_cpu=True, **options)


def test_bad_values_of_a_mixin_in_the_other_order_are_refused_by_attach(make_trainer):
    from hf_warmup.trainer import WarmupCallback

    @dataclasses.dataclass
    class Backwards(TrainingArguments, WarmupArguments):
        pass

    trainer = make_trainer(args_cls=Backwards, init_lr="banana")
    with pytest.raises(ValueError, match="got 'banana'"):
        WarmupCallback.attach(trainer)
