"""The command `hf-sara`: plan, look at, share, merge, export and try adapters without writing code.

Modules that take long to import are imported inside of the commands, so that `--help` does not wait for them.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from . import __version__
from .cli_options import listed, token_ids

# The longest text of a model whose configuration names no limit.
MOST_TOKENS = 32_768
# Arguments of the library, and the parameters of the commands that have other names.
OTHER_NAMES = {"base_model": "base", "parameter_budget": "budget"}


class _Commands(TyperGroup):
    """
    The commands, with one treatment of their errors: also of those that printing a result brings about. An error is
    one line on stderr, with exit code 1. An error that is none of those for people is a bug, and with HF_SARA_TRACE=1
    it is raised, so that its trace tells where it is.
    """

    def invoke(self, ctx: Any) -> Any:
        from .errors import print_anything

        print_anything()
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, (typer.Abort, BrokenPipeError)):
                # typer ends with its own errors, and with this one, without a trace.
                raise
            if isinstance(error, (ValueError, OSError, ImportError)):
                _fail(_with_options(str(error), self.commands.get(ctx.invoked_subcommand)), error)
            if os.environ.get("HF_SARA_TRACE") == "1":
                raise
            text = f"{type(error).__name__}: {error} (to see where, set the environment variable HF_SARA_TRACE=1)"
            _fail(text, error)


def _fail(message: str, error: Exception) -> NoReturn:
    from .errors import one_line

    typer.echo(f"hf-sara: {one_line(message)}", err=True)
    raise typer.Exit(1) from error


def _with_options(message: str, command: Any) -> str:
    """A message of the library, in which its arguments have the names of the command's options."""
    params = {} if command is None else {param.name: param.opts[0] for param in command.params}
    options = {name: option for name, option in params.items() if option.startswith("--")}
    options |= {other: options[name] for other, name in OTHER_NAMES.items() if name in options}
    # A single word is the name of an argument only where its value follows. A part of a path, or of a value, is none.
    names = "|".join(name if "_" in name else f"{name}(?==)" for name in options)
    if not names:
        return message
    pattern = rf"""(?<![\w/\\.'"-])({names})(?![\w/\\-]|\.\w)"""
    return re.sub(pattern, lambda found: options[found[1]], message)


app = typer.Typer(
    cls=_Commands,
    help="SARA and Mo-SARA adapters for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-sara {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.", show_default=False)]
Names = Optional[list[str]]  # noqa: UP045
Summary = Annotated[bool, typer.Option("--summary", help="Print only the line that sums it up.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Base = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Folder or Hub id of the base. Default: the recorded one, which is none if it was a folder."),
]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit.")]  # noqa: UP045


def _parts(spec: Any) -> list[dict[str, Any]]:
    """What an adapter trains beside its updates."""
    from .parts import count

    return [{"name": part.name, "how": part.title, "trained": count(part)} for part in spec.parts]


def _say(text: str) -> None:
    """Print one line, which may have names from files in it."""
    from .errors import one_line

    typer.echo(one_line(text))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.", show_default=False)],
    method: Annotated[str, typer.Option(help="sara or mo_sara.")] = "sara",
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="In (0, 1]: 0.01 suits sara, and 0.5 mo_sara. Larger means larger ranks."),
    ] = None,
    budget: Annotated[Optional[str], typer.Option(help="Solve the threshold: a count, or a share like 0.1%.")] = None,  # noqa: UP045
    num_heads: Annotated[int, typer.Option(help="Mo-SARA: vectors that the router mixes.")] = 5,
    target_modules: Annotated[Names, typer.Option(help="Modules to adapt: names with commas, or all-linear.")] = None,
    exclude_modules: Annotated[Names, typer.Option(help="Linear modules to leave out: names with commas.")] = None,
    layers: Annotated[Optional[str], typer.Option(help="Layers to adapt: 0-7,12.")] = None,  # noqa: UP045
    modules_to_save: Annotated[
        Names, typer.Option(help="Modules to train in full: names with commas. none: not even a new head.")
    ] = None,
    trainable_token_indices: Annotated[
        Names, typer.Option(help="Ids of tokens whose rows of the embedding train, with commas.")
    ] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Image file for a figure of the ranks.")] = None,  # noqa: UP045
    save: Annotated[Optional[Path], typer.Option(help="JSON file for the plan, from which trainings take it.")] = None,  # noqa: UP045
    summary: Summary = False,
    peft: Annotated[bool, typer.Option("--peft", help="Print the ranks as JSON for PEFT's LoraConfig.")] = False,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: a GPU, if one is there.")] = None,  # noqa: UP045
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Print the ranks and parameters, for a threshold or a budget. This reads one matrix at a time."""
    from .arguments import SaraArguments
    from .plan_file import save_plan
    from .planning import plan as plan_adapter

    args = SaraArguments(
        method=method,
        threshold=threshold,
        parameter_budget=budget,
        num_heads=num_heads,
        target_modules=listed(target_modules),
        exclude_modules=listed(exclude_modules),
        layers=layers,
        modules_to_save=listed(modules_to_save),
        trainable_token_indices=token_ids(trainable_token_indices),
    )
    found = plan_adapter(model, args, revision=revision, device=device)
    ranks = found.rank_pattern() if peft else {}
    if plot is not None:
        found.plot(plot)
    if save is not None:
        save_plan(found, save)
    for written in filter(None, (plot, save)):
        # Scripts read the other stream.
        typer.echo(f"Wrote {written}", err=True)
    if peft:
        # With lora_alpha equal to the rank, every module has the same scale.
        _print_json({"target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": ranks})
        return
    if not as_json:
        for line in [str(found)] if summary else found.table().splitlines():
            _say(line)
        return
    sites = [{**_site(site), "trained": found.count(site)} for site in found.sites]
    facts = {
        "method": method,
        "threshold": found.threshold,
        "trained_parameters": found.trained_parameters,
        "share": found.share,
        "limit": found.limit,
    }
    _print_json(facts if summary else {**facts, "sites": sites, "parts": _parts(found)})


def _site(site: Any) -> dict[str, Any]:
    return {"site": site.name, "d_in": site.shape[0], "d_out": site.shape[1], "k": site.k}


@app.command()
def info(adapter: Adapter, summary: Summary = False, revision: Revision = None, as_json: AsJson = False) -> None:
    """Print what an adapter is: method, ranks, base, dtype, versions, bytes, and how it was trained."""
    from . import hub, storage
    from .publishing import TRAINING_ARGS_FILE, main_settings

    folder = hub.fetch_adapter(adapter, revision=revision, beside=(TRAINING_ARGS_FILE,))
    saved = storage.read(folder)
    facts: dict[str, Any] = {
        "method": saved.args.method,
        "threshold": saved.threshold,
        "heads": saved.method.router_heads,
        "dropout": saved.args.dropout,
        "dtype": saved.dtype,
        "base": saved.base.to_json(),
        "arguments": saved.args.to_dict(),
        "versions": saved.versions,
        "training": main_settings(folder),
        "trained_parameters": saved.trained_parameters,
        "bytes": storage.size_on_disk(folder),
    }
    if as_json:
        sites = {} if summary else {"sites": list(map(_site, saved.sites)), "parts": _parts(saved)}
        _print_json({**facts, **sites})
        return
    first, *others = saved.table().splitlines()
    _say(first)
    if summary:
        return
    base = saved.base.model_id or f"a {saved.base.class_name} that is not on the Hub"
    _say(f"base: {base}, {saved.base.dtype}" + (f", revision {saved.base.revision}" if saved.base.revision else ""))
    heads = "" if facts["heads"] is None else f"{facts['heads']:,} heads, "
    _say(f"adapter: {heads}dropout {saved.args.dropout:g}, {saved.dtype}, {facts['bytes']:,} bytes")
    for name in ("versions", "training"):
        if facts[name]:
            _say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts[name].items()))
    for line in others:
        _say(line)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Where to: user/name.", show_default=False)],
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload adapter",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch; made if it does not exist.")] = None,  # noqa: UP045
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push an adapter's own files, and only those, in one commit."""
    from .hub import push_folder

    commit = push_folder(
        folder,
        repo_id,
        commit_message=message,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
    )
    facts = {"url": commit.commit_url, "commit": commit.oid, "pull_request": commit.pr_url}
    _print_json(facts) if as_json else typer.echo(commit.pr_url or commit.commit_url)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="Hub id of an adapter.", show_default=False)],
    to: Annotated[Optional[Path], typer.Option(help="Folder to copy it to; default: leave it in the cache.")] = None,  # noqa: UP045
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Download an adapter, check it, and print its folder."""
    from huggingface_hub import snapshot_download

    from . import hub, storage
    from .files import naming, new_folder
    from .own_tokenizer import TOKENIZER_FILES

    folder = hub.fetch_adapter(repo_id, revision=revision, beside=TOKENIZER_FILES)
    tensors = storage.read(folder).tensors
    if to is not None:
        if not Path(repo_id).is_dir():
            # The folder's name is the commit, so that the card is that of this adapter.
            snapshot_download(repo_id, revision=folder.name, allow_patterns=list(hub.UPLOAD_FILES))
        # The card and the tokenizer of an adapter that is there are not those of the new one.
        old = hub.UPLOAD_FILES if (to / storage.TENSORS_FILE).is_file() else storage.LEFT_OVERS
        with new_folder(to, replaced=old) as new:
            for name in hub.UPLOAD_FILES:
                if (folder / name).is_file():
                    with naming(new / name):
                        (new / name).write_bytes((folder / name).read_bytes())
        folder = to
    _print_json({"folder": str(folder), "tensors": len(tensors)}) if as_json else typer.echo(str(folder))


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.", show_default=False)],
    base: Base = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, file by file, and save a plain model."""
    from . import hub, storage
    from .merge_files import merge_shards
    from .own_tokenizer import TOKENIZER_FILES
    from .sharing import fetch_base

    folder = hub.fetch_adapter(adapter, revision=revision, beside=TOKENIZER_FILES)
    merge_shards(fetch_base(storage.read(folder), base), folder, out)
    _print_json({"folder": str(out)}) if as_json else typer.echo(str(out))


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder for the LoRA.", show_default=False)],
    base: Base = None,
    max_rank: Annotated[Optional[int], typer.Option(help="Cut every rank to this, with the least error.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the LoRA in a folder that exists.")] = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Export an adapter to PEFT's LoRA format, for vLLM, PEFT and others."""
    from .export import export_lora

    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"The folder {out} is not empty. Give another folder, or --overwrite to replace the LoRA in it."
        )
    report = export_lora(_load(adapter, base, revision), out, max_rank=max_rank, base_model_name_or_path=base)
    facts = {"folder": str(out), "ranks": report.ranks, "errors": report.errors, "bytes": report.size}
    _print_json(facts) if as_json else typer.echo(f"{out}: {report}")


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest output in tokens.")] = 50,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Let a causal language model with its adapter continue a prompt, by greedy decoding."""
    from . import hub, storage
    from .base_files import base_config, loading
    from .base_model import model_class
    from .errors import escaped
    from .own_tokenizer import TOKENIZER_FILES, has_own_tokenizer, load_tokenizer
    from .sharing import recorded_base

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}, and has to be at least 1.")
    # What can be wrong is found out before the weights are loaded, which takes long.
    folder = hub.fetch_adapter(adapter, revision=revision, beside=TOKENIZER_FILES)
    saved = storage.read(folder)
    kind = model_class(saved.base.class_name)
    if kind is not None and not kind.can_generate():
        raise ValueError(f"The adapter in {folder} is for a {kind.__name__}, which cannot generate text.")
    name, commit = (base, None) if base is not None else recorded_base(saved.base, folder)
    with loading(f"The base {name!r} of the adapter in {folder}"):
        config = base_config(name, revision=commit or "main")
    own = has_own_tokenizer(folder, saved.base)
    tokenizer = load_tokenizer(folder) if own else load_tokenizer(name, revision=commit or "main")
    inputs = _tokenize(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    _check_length(config, length, max_new_tokens)
    model = _load(adapter, base, revision)
    largest, rows = int(inputs["input_ids"].max()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"The prompt has the token {largest}, and the model has {rows} tokens: the tokenizer is wrong."
        )
    # The configuration of the base may ask for other ways of decoding.
    greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, **greedy)
    new = output[0] if config.is_encoder_decoder else output[0, length:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    _print_json({"prompt": prompt, "text": text}) if as_json else typer.echo(escaped(text, keep="\n\t"))


def _tokenize(tokenizer: Any, prompt: str) -> Any:
    """The tokens of a prompt, of which there has to be one at least."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The prompt has bytes that are not UTF-8 text: {error}.") from error
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError(f"The prompt {prompt!r} has no tokens, so there is nothing to go on from. Give some text.")
    return inputs


def _check_length(config: Any, prompt: int, output: int) -> None:
    """Raise a `ValueError` if a prompt, or what is to follow it, is too long for the model."""
    text_config = config.get_text_config(decoder=True)
    named = [getattr(text_config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    most = next((size for size in named if type(size) is int and size > 0), MOST_TOKENS)
    # The output of a decoder with an encoder does not begin with the prompt.
    length = max(prompt, output) if config.is_encoder_decoder else prompt + output
    if length > most:
        raise ValueError(
            f"The prompt has {prompt:,} tokens and --max-new-tokens is {output:,}, and the model takes {most:,} "
            "tokens at most. Give a smaller number, or a shorter prompt."
        )


def _load(adapter: str, base: str | None, revision: str | None) -> Any:
    from .sharing import from_hub

    return from_hub(adapter, base_model=base, revision=revision)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete what is there.")] = False, as_json: AsJson = False
) -> None:
    """Print the size and the place of the cache of singular values and vectors."""
    from .cache import cache_files, cache_folder, clear_cache

    folder, files = cache_folder(), cache_files()
    size = sum(path.stat().st_size for path in files)
    kept = clear_cache() if clear else []
    if kept:
        raise PermissionError(
            f"{len(kept):,} of {len(files):,} files in {folder} cannot be deleted: another program has them open, or "
            "they are not yours. Try again when no program uses an adapter."
        )
    facts = {"folder": str(folder), "files": len(files), "bytes": size, "cleared": clear}
    done = "deleted" if clear else "kept"
    _print_json(facts) if as_json else _say(f"{folder}: {len(files):,} files, {size:,} bytes {done}")


if __name__ == "__main__":
    app()
