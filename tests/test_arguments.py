import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_sara import SaraArguments
from hf_sara.arguments import check_threshold, parse_budget, parse_layers


def test_defaults_are_those_of_the_paper():
    assert SaraArguments().resolved_threshold() == 0.01
    args = SaraArguments(method="mo_sara")
    assert (args.resolved_threshold(), args.num_heads, args.dropout, args.v_position) == (0.5, 5, 0.05, "back")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora"}, "method='lora'.*sara, mo_sara"),
        ({"v_position": "middle", "method": "mo_sara"}, "v_position='middle'"),
        ({"factors": "maybe"}, "factors='maybe'"),
        ({"threshold": 0.0}, "threshold=0.0.*0 < threshold <= 1"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": 1.0001}, "threshold=1.0001"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": True}, "threshold=True"),
        ({"threshold": 0.1, "parameter_budget": "10"}, "exclude each other"),
        ({"parameter_budget": "0%"}, "parameter_budget='0%'"),
        ({"parameter_budget": "100%"}, "parameter_budget='100%'"),
        ({"parameter_budget": "0"}, "parameter_budget='0'"),
        ({"parameter_budget": "many"}, "parameter_budget='many'"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 1.5}, "num_heads=1.5"),
        ({"num_heads": True}, "num_heads=True"),
        ({"dropout": 1.0}, r"dropout=1.0.*\[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"layers": "3-1"}, "runs backwards"),
        ({"layers": "a"}, "cannot read 'a'"),
        ({"layers": ""}, "cannot read ''"),
        ({"method": "mo_sara", "singular_values": False}, "ablations of method='sara'"),
        ({"method": "mo_sara", "zero_init_vh": True}, "ablations of method='sara'"),
        ({"v_position": "front"}, "option of method='mo_sara'"),
    ],
)
def test_a_value_out_of_range_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        SaraArguments(**values)


@pytest.mark.parametrize("threshold", [1, 1.0, 1e-9])
def test_the_ends_of_the_range_of_thresholds_are_in_it(threshold):
    assert SaraArguments(threshold=threshold).resolved_threshold() == threshold


def test_the_error_of_a_threshold_names_the_site():
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: threshold=2"):
        check_threshold(2, "layers.3.q_proj")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("0.1%", (0.001, None)),
        (".5 %", (0.005, None)),
        ("12%", (0.12, None)),
        (" 200000 ", (None, 200000)),
        ("1_000,000", (None, 1000000)),
    ],
)
def test_budgets(text, read):
    share, count = parse_budget(text)
    assert count == read[1]
    assert share == (None if read[0] is None else pytest.approx(read[0]))


def test_a_budget_may_be_a_number():
    assert SaraArguments(parameter_budget=5000).parameter_budget == "5000"


def test_layers():
    assert parse_layers("0-2,5") == {0, 1, 2, 5}
    assert parse_layers(" 3 , 1 - 1 ") == {1, 3}
    # As YAML reads it.
    assert SaraArguments(layers=5).layers == "5"


def test_one_target_module_may_be_a_string():
    assert SaraArguments(target_modules="q_proj").target_modules == ["q_proj"]


def test_the_fields_survive_json():
    args = SaraArguments(method="mo_sara", threshold=0.25, num_heads=2, target_modules=["q", "v"], layers="0-3")
    assert SaraArguments(**json.loads(json.dumps(args.to_dict()))) == args


def test_the_parser_of_transformers_reads_them_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((SaraArguments, TrainingArguments))
    line = f"--method mo_sara --threshold 0.3 --target_modules q v --zero_init_vh False --output_dir {tmp_path}"
    args, training = parser.parse_args_into_dataclasses(line.split())
    assert (args.method, args.threshold, args.target_modules, args.layers) == ("mo_sara", 0.3, ["q", "v"], None)
    assert training.output_dir == str(tmp_path)
    # A percent sign in a help text breaks argparse unless it is doubled.
    assert "0.1%" in parser.format_help()


@pytest.mark.parametrize(("budget", "asked"), [("0.3", "0.3"), (".05", ".05"), (0.001, "0.001"), ("1.5", "1.5")])
def test_a_budget_without_a_percent_sign_is_asked_for(budget, asked):
    with pytest.raises(ValueError, match=rf"Was '{asked}%' meant\?"):
        SaraArguments(parameter_budget=budget)
    for other in ("0.0", "x", "-0.3", "0.3.1"):
        with pytest.raises(ValueError, match=r"'0\.1%'\.$"):
            SaraArguments(parameter_budget=other)
