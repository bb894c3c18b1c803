"""The command line on a tiny model folder: output, exit status, errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_files

import specref
from specref import cli, timing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_files.write_folder(tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Status, standard output and standard error of a command."""

    def command(*argv: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = cli.main(argv)
        return status, *capsys.readouterr()

    return command


def short(*argv: str) -> tuple[str, ...]:
    return ("generate", *argv, "--max-new-tokens", "6")


# What it prints


def test_generate_prints_text_and_then_what_it_took(run, folder):
    argv = short("the", "--target", folder, "--method", "autoregressive")
    status, out, err = run(*argv)
    loaded = specref.load(folder)
    want = specref.generate(
        loaded, "the", "autoregressive", max_new_tokens=6
    )
    assert status == 0
    assert out == want.text + "\n"
    n = len(want.tokens)
    assert f"{n} tokens, {n} target calls, tau 1.00" in err


def test_generate_json_is_one_record(run, folder):
    argv = short("-", "--target", folder, "--method", "int8", "--json")
    status, out, _ = run(*argv, "--temperature", "1", stdin="from a pipe")
    record = json.loads(out)
    loaded = specref.load(folder)
    want = specref.generate(
        loaded, "from a pipe", "int8", temperature=1.0, max_new_tokens=6
    )
    assert status == 0
    assert record["tokens"] == want.tokens
    assert record["text"] == want.text
    assert record["tau"] == pytest.approx(want.tau)
    assert set(record) == {
        "text",
        "tokens",
        "tau",
        "target_calls",
        "seconds",
        "tokens_per_s",
        "acceptance_by_depth",
        "interrupted",
    }


def test_options_reach_the_method(run, folder):
    argv = short("a b a b a", "--target", folder, "--json")
    for method, extra in (
        ("early_exit", ("--option", "layers=2", "--gamma", "2")),
        ("prompt_lookup", ("--option", "ngram=1")),
        ("speculative", ("--option", "draft=int8", "--gamma", "3")),
    ):
        status, out, err = run(*argv, "--method", method, *extra)
        assert status == 0, err
        assert json.loads(out)["tokens"]


def test_methods_and_models_are_listed(run, monkeypatch, tmp_path):
    status, out, _ = run("methods", "--json")
    table = json.loads(out)
    assert status == 0
    assert [r["name"] for r in table] == [m.name for m in specref.methods()]
    keys = {"name", "paper", "chapter", "lossless", "weights", "summary"}
    assert all(keys <= set(r) for r in table)
    book = Path(__file__).resolve().parent.parent / "book"
    for row in table:  # a page of the book, notebook or not
        assert list(book.glob(row["chapter"] + ".*")), row
    status, out, _ = run("methods")
    assert status == 0
    assert all(r["name"] in out and r["paper"] in out for r in table)
    monkeypatch.setenv("SPECREF_HOME", str(tmp_path))
    status, out, _ = run("models", "--json")
    (model,) = json.loads(out)
    assert (status, model["name"]) == (0, "smollm2-135m")
    assert model["ready"] is None
    status, out, _ = run("models")
    assert "not fetched: specref models --fetch" in out


def test_models_json_says_where_a_model_lies(run, monkeypatch, tmp_path):
    folder = tmp_path / "smollm2-135m-f32"
    folder.mkdir()
    (folder / "complete.json").write_text("{}")
    monkeypatch.setenv("SPECREF_HOME", str(tmp_path))
    status, out, err = run("models", "--json")
    assert status == 0, err
    assert json.loads(out)[0]["ready"] == str(folder)


def test_bench_rows(run, folder, tmp_path, monkeypatch):
    # Times of a tiny model on a busy machine vary wildly: not the matter.
    monkeypatch.setattr(timing, "WILD", float("inf"))
    monkeypatch.setattr(
        timing, "Curves", partial(timing.Curves, (1, 2, 9), repeats=1)
    )
    file = tmp_path / "out.json"
    status, out, err = run(
        "bench",
        *("--target", folder, "--methods", "prompt_lookup"),
        *("--prompts", "2", "--max-new-tokens", "4", "--no-transformers"),
        *("--json", "--out", str(file)),
    )
    assert status == 0, err
    result = json.loads(out)
    assert json.loads(file.read_text()) == result
    assert {"device", "threads", "torch", "date"} <= set(result["provenance"])
    rows = result["rows"]
    assert {r["method"] for r in rows} == {"autoregressive", "prompt_lookup"}
    assert {r["kind"] for r in rows} == {"all", "chat", "code"}
    for row in rows:
        assert row["lossless"] is True
        assert row["identical_to_greedy"] is True
        assert row["speedup_vs_transformers"] is None
        assert 1.0 <= row["tau"] <= 5.0
        assert row["speedup_vs_own"] > 0
        assert row["predicted"] > 0


def test_version_and_help(run):
    assert run("--version")[:2] == (0, f"specref {specref.__version__}\n")
    status, out, _ = run()
    assert status == 2
    assert "COMMAND" in out


def test_python_m_specref():
    root = Path(specref.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "specref", "generate", "x", "--target", "no"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("specref: unknown model 'no': give one of")


# What it refuses


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--method", "magic"), "unknown method 'magic': give one of"),
        (("--gamma", "0", "--method", "int8"), "gamma must be at least 1"),
        (("--max-new-tokens", "0"), "max_new_tokens must be"),
        (("--max-new-tokens", "1024"), "exceeds the target's 1024 positions"),
        (("--temperature", "-1"), "temperature must be at least 0"),
        (("--top-k", "0"), "top_k must be at least 1, got 0"),
        (("--top-p", "1.5"), "top_p must be in (0, 1], got 1.5"),
        (("--seed", "-1"), "seed and stream must be at least 0"),
        (("--stop", ""), "stop must not hold an empty text"),
        (("--option", "layers"), "option must read name=value, got 'layers'"),
        (
            ("--method", "autoregressive", "--option", "k=2"),
            "method 'autoregressive' takes no option 'k'",
        ),
        (
            ("--method", "autoregressive", "--gamma", "2"),
            "method 'autoregressive' takes no option 'gamma'",
        ),
        (("--option", "draft=tiny"), "unknown draft 'tiny': give one of"),
        (("--dtype", "float31"), "dtype must be"),
        (("--dtype", "int32"), "dtype must be one of float32"),
        (("--device", "gpu"), "device 'gpu' can not be used here"),
        (("--target", "smol"), "unknown model 'smol': give one of"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_status_2(
    run, folder, extra, message
):
    status, out, err = run(*short("hello", "--target", folder), *extra)
    assert status == 2
    assert out == ""
    assert err.startswith("specref: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_prompt_is_refused(run, folder):
    for argv in (("",), ("-",)):
        status, _, err = run(*short(*argv, "--target", folder))
        assert status == 2
        assert "prompt must have at least one token" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("bench", "--methods", "magic"), "unknown method 'magic'"),
        (("bench", "--study", "magic"), "study must be one of"),
        (("bench", "--prompts", "0"), "prompts must be"),
        (("train", "magic"), "recipe must be one of"),
    ],
)
def test_bench_and_train_refuse_what_they_do_not_know(
    run, folder, argv, message
):
    more = ("--target", folder, "--no-transformers", "--json")
    status, out, err = run(*argv, *(more if argv[0] == "bench" else ()))
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [("dance",), ("generate",), ("train",)])
def test_argparse_ends_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: specref" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_generated(run, folder, monkeypatch):
    from specref.lm import Llama

    calls, forward = [], Llama.forward

    def interrupt(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(Llama, "forward", interrupt)
    argv = short("the", "--target", folder, "--method", "autoregressive")
    status, out, err = run(*argv)
    assert status == 0
    assert "3 tokens, 3 target calls" in err
    assert "(interrupted)" in err
