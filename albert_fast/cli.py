"""The command line: `albert-fast COMMAND …`. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="albert-fast", description="ALBERT made fast.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    env = commands.add_parser("env", help="which backend serves each operation here, and why the others do not")
    env.add_argument("--device", default=None, help="cpu, cuda, cuda:1 …; all that are here when not given")
    env.set_defaults(run=_env)

    build = commands.add_parser("build", help="compile the native kernels now and print where they are")
    build.add_argument("--force", action="store_true", help="compile them anew")
    build.add_argument(
        "--cuda",
        nargs="*",
        metavar="ARCHITECTURE",
        help="the CUDA kernels in place of the CPU's: for 80, 90a, 100 …, or for the GPUs that are here",
    )
    build.set_defaults(run=_build)

    convert = commands.add_parser("convert", help="write a checkpoint anew: sharded, single, or in another dtype")
    convert.add_argument(
        "source",
        help="a Hugging Face directory, a weight file beside its config.json, or Google's TensorFlow checkpoint",
    )
    convert.add_argument("target", help="the directory to make")
    convert.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; that of the file when not given")
    convert.add_argument(
        "--max-shard-size", default="5GB", help="largest weight file, such as 500MB (default: %(default)s)"
    )
    convert.add_argument("--bin", action="store_true", help="pytorch_model.bin in place of safetensors")
    convert.add_argument(
        "--architecture",
        default=None,
        help="of a TensorFlow checkpoint: AlbertForQuestionAnswering …; what its heads tell when not given",
    )
    convert.set_defaults(run=_convert)

    average = commands.add_parser("average", help="the mean of several checkpoints of one run")
    average.add_argument("sources", nargs="+", metavar="DIR", help="Hugging Face directories, at least two")
    average.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")
    average.set_defaults(run=_average)

    quantize = commands.add_parser("quantize", help="a checkpoint whose encoder is to run in int8, and what that costs")
    quantize.add_argument("source", help="a Hugging Face directory with its vocabulary")
    quantize.add_argument("target", help="the directory to make")
    quantize.add_argument("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 text to measure the loss on")
    quantize.set_defaults(run=_quantize)

    vocab = commands.add_parser("vocab", help="train a sentencepiece vocabulary with ALBERT's options")
    _add_reading(vocab)
    vocab.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")
    vocab.add_argument("--size", default="30000", metavar="N", help="pieces (default: %(default)s)")
    vocab.add_argument(
        "--sentences-sampled",
        default="10000000",
        metavar="N",
        help="sentences, drawn from all, that the trainer holds in memory (default: %(default)s)",
    )
    vocab.add_argument("--cased", action="store_true", help="keep capitals")
    vocab.add_argument("--keep-accents", action="store_true", help="keep accents and compatibility characters")
    vocab.set_defaults(run=_vocab)

    corpus = commands.add_parser("corpus", help="make a token store of texts; called again, it goes on with one")
    _add_reading(corpus)
    corpus.add_argument("-o", "--output", required=True, metavar="STORE", help="the directory to make")
    corpus.add_argument("--vocab", required=True, metavar="DIR", help="a sentencepiece model, or a directory with one")
    corpus.add_argument("--workers", metavar="N", help="processes (default: as many as there are cores and work for)")
    corpus.add_argument("--force", action="store_true", help="remove the store that is there")
    corpus.set_defaults(run=_corpus)

    pretrain = commands.add_parser(
        "pretrain",
        help="train an ALBERT on a token store; called again, it goes on",
        description="Trains what CONFIG describes. `torchrun --nproc-per-node N -m albert_fast.cli pretrain …` does so "
        "in several processes.",
    )
    pretrain.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, or a preset: see --keys")
    pretrain.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's: batch.size=256")
    pretrain.add_argument("--keys", action="store_true", help="print the presets and all keys with their defaults")
    pretrain.add_argument(
        "--find-batch-size", action="store_true", help="try micro-batches, print what they take, and train nothing"
    )
    pretrain.set_defaults(run=_pretrain)

    finetune = commands.add_parser(
        "finetune",
        help="train a task on labelled examples; called again, it goes on",
        description="Presets for --config are the original's recipes: "
        "glue-cola, glue-sst2 …, squad-v1, squad-v2, race. Keeps the checkpoint that is best on --dev in OUT/best. "
        "`torchrun --nproc-per-node N -m "
        "albert_fast.cli finetune …` does so in several processes.",
    )
    finetune.add_argument(
        "task", nargs="?", metavar="TASK", help="classification, tagging, answering, choice, translation, speech"
    )
    finetune.add_argument("--set", nargs="+", default=[], metavar="key=value", help="such as epochs=5; see --keys")
    finetune.add_argument("--model", metavar="DIR", help="a checkpoint with its vocabulary, or a config.json")
    finetune.add_argument("--train", nargs="+", metavar="FILE", help="labelled examples")
    finetune.add_argument("--dev", nargs="+", metavar="FILE", help="labelled examples to evaluate on")
    finetune.add_argument("-o", "--output", metavar="OUT", help="the directory of the run")
    finetune.add_argument("--config", metavar="YAML", help="a preset, or a file with any of the keys")
    finetune.add_argument("--keys", action="store_true", help="print all keys with their defaults")
    finetune.set_defaults(run=_finetune)

    evaluate = commands.add_parser("evaluate", help="the figures of a fine-tuned model on labelled files, as JSON")
    predict = commands.add_parser("predict", help="what a fine-tuned model says of files, a line of JSON each")
    evaluate.add_argument(
        "--exits",
        action="store_true",
        help="of a model with early exits: accuracy and time by rule, a line of JSON each",
    )
    for command, run in ((evaluate, _evaluate), (predict, _predict)):
        command.add_argument("model", help="a directory that `albert-fast finetune` wrote, such as OUT/best")
        command.add_argument("files", nargs="+", metavar="FILE", help="of the task's format")
        command.add_argument("-o", "--output", metavar="FILE", help="where to write; standard output when not given")
        command.add_argument("--set", nargs="+", default=[], metavar="key=value", help="such as data.text=1")
        command.add_argument("--device", default=None, help="cpu, cuda …; a GPU where there is one when not given")
        command.set_defaults(run=run)

    extend = commands.add_parser("extend", help="lengthen a model's position table by interpolation")
    extend.add_argument("source", metavar="DIR", help="a Hugging Face directory")
    extend.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")
    extend.add_argument("--positions", required=True, metavar="N", help="tokens that a row may have then, such as 2048")
    extend.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; that of the file when not given")
    extend.set_defaults(run=_extend)

    plot = commands.add_parser("plot", help="the curves of one run or several, side by side")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="directories that `pretrain` or `finetune` has written")
    plot.add_argument("-o", "--output", required=True, metavar="PNG", help="the picture to make")
    plot.add_argument("--x", default="tokens", help="tokens, step or seconds (default: %(default)s)")
    plot.set_defaults(run=_plot)

    from albert_fast.bench import arguments

    bench = commands.add_parser("bench", help="time this package beside transformers, parity first")
    arguments.add_to(bench)
    bench.set_defaults(run=_bench)

    profile = commands.add_parser("profile", help="where a step's time goes: a Chrome trace and a table")
    arguments.add_profile_to(profile)
    profile.set_defaults(run=_profile)

    report = commands.add_parser("report", help="a page, in one file, of what `bench --json` has written")
    report.add_argument("results", nargs="+", metavar="RESULT", help="JSON files of `albert-fast bench` or `make gpu`")
    report.add_argument("-o", "--output", required=True, metavar="HTML", help="the page to make")
    report.add_argument(
        "--compare", action="store_true", help="of two results, A and B: what changed from A to B beyond noise"
    )
    report.set_defaults(run=_report)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of how texts are read; albert_fast.pretraining.reading says what they mean, and checks them."""
    parser.add_argument("texts", nargs="+", metavar="TEXT", help=".txt, .txt.gz, .jsonl, .jsonl.gz or .parquet files")
    parser.add_argument(
        "--documents",
        default="blank",
        metavar="RULE",
        help="what is a document of plain text: blank (blank lines stand between documents), file or line "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sentences",
        default="split",
        metavar="RULE",
        help="what is a sentence: split (lines are joined where they were wrapped, and split at stops) or line "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--field", default="text", help="of .jsonl and .parquet: where the text is (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="count lines that cannot be read; do not stop there"
    )


def _env(args: argparse.Namespace) -> int:
    import platform

    import torch

    import albert_fast
    from albert_fast import backends

    print(f"albert_fast {albert_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads")
    names = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError:
        raise ValueError(f"--device is {args.device!r}; a device such as cpu or cuda:1 was expected") from None
    for device in devices:
        title = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"\n{title}")
        for operation, backend, refusals in backends.report(device):
            print(f"  {operation:<24} {backend}")
            for other, reason in refusals.items():
                print(f"  {'':<24}   not {other}: {reason}")
    return 0


def _build(args: argparse.Namespace) -> int:
    from albert_fast import native, native_cuda

    if args.cuda is not None:
        return native_cuda.build_command(args.cuda, args.force)
    return native.build_command(args.force)


def _convert(args: argparse.Namespace) -> int:
    from albert_fast.checkpoint import convert

    convert(
        args.source,
        args.target,
        max_shard_size=args.max_shard_size,
        safe_serialization=not args.bin,
        dtype=args.dtype,
        architecture=args.architecture,
    )
    print(f"wrote {args.target}")
    return 0


def _average(args: argparse.Namespace) -> int:
    from albert_fast.checkpoint import average

    average(args.sources, args.output)
    print(f"wrote {args.output}")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from albert_fast import AlbertModel, PackedBatch, quantization
    from albert_fast.bench.data import read_text
    from albert_fast.checkpoint import convert
    from albert_fast.tokenizer import AlbertTokenizer

    text = read_text(args.text)
    tokenizer = AlbertTokenizer.from_pretrained(args.source)
    model = AlbertModel.from_pretrained(args.source)
    convert(args.source, args.target)
    # What calibrates is not what the loss is measured on, where there is enough text.
    calibrating, measured = text.paragraphs[:32], text.paragraphs[32:288] or text.paragraphs
    ids = tokenizer(list(calibrating), truncation=True, max_length=model.config.max_position_embeddings)["input_ids"]
    quantization.write(model.quantize(calibration=PackedBatch.from_sequences(ids)), args.target)
    loss = quantization.accuracy_loss(model, tokenizer, measured)
    print(f"wrote {args.target}\n{loss}; text: {text.source}")
    return 0


def _vocab(args: argparse.Namespace) -> int:
    from albert_fast.pretraining import vocabulary_training
    from albert_fast.pretraining.progress import Progress
    from albert_fast.pretraining.reading import Options

    options = Options(args.documents, args.sentences, args.field, args.skip_bad_lines)
    tokenizer = vocabulary_training.train(
        args.texts,
        args.output,
        options,
        size=_positive("--size", args.size),
        sampled=_positive("--sentences-sampled", args.sentences_sampled),
        cased=args.cased,
        keep_accents=args.keep_accents,
        progress=Progress(),
    )
    print(f"wrote {args.output}: {len(tokenizer)} pieces")
    return 0


def _corpus(args: argparse.Namespace) -> int:
    from pathlib import Path

    from albert_fast.pretraining import corpus
    from albert_fast.pretraining.progress import Progress
    from albert_fast.pretraining.reading import Options
    from albert_fast.tokenizer import AlbertTokenizer

    options = Options(args.documents, args.sentences, args.field, args.skip_bad_lines)
    workers = None if args.workers is None else _positive("--workers", args.workers)
    is_file = Path(args.vocab).is_file()
    tokenizer = AlbertTokenizer(args.vocab) if is_file else AlbertTokenizer.from_pretrained(args.vocab)
    try:
        store = corpus.build(
            args.texts,
            tokenizer,
            args.output,
            options,
            workers=workers,
            force=args.force,
            progress=Progress(),
        )
    except KeyboardInterrupt:
        print(f"albert-fast corpus: stopped; the same command goes on with {args.output}", file=sys.stderr)
        return 130
    print(corpus.summary(store))
    return 0


def _finetune(args: argparse.Namespace) -> int:
    import json

    from albert_fast.finetuning import run
    from albert_fast.finetuning.config import CONFIGURATION

    if args.keys:
        print(CONFIGURATION.describe())
        return 0
    given = {"model": args.model, "output": args.output, "data.train": args.train, "data.dev": args.dev}
    named = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items() if value]
    task = [] if args.task is None else [f"task={args.task}"]
    return run.finetune(CONFIGURATION.parse(args.config, [*task, *named, *args.set]))


def _evaluate(args: argparse.Namespace) -> int:
    import json

    def figures(pipeline: Any) -> str:
        if args.exits:
            from albert_fast.finetuning.exits import curve

            return "".join(json.dumps(point) + "\n" for point in curve(pipeline, args.files))
        return json.dumps(pipeline.evaluate(args.files), indent=2) + "\n"

    return _with_pipeline(args, figures)


def _predict(args: argparse.Namespace) -> int:
    import json

    def lines(pipeline: Any) -> str:
        return "".join(json.dumps(said, ensure_ascii=False) + "\n" for said in pipeline.predict(args.files))

    return _with_pipeline(args, lines)


def _with_pipeline(args: argparse.Namespace, text: Callable[[Any], str]) -> int:
    from pathlib import Path

    from albert_fast.finetuning.run import Pipeline

    if args.output is not None:
        _check_writable(args.output)
    written = text(Pipeline(args.model, args.set, device=args.device))
    if args.output is None:
        sys.stdout.write(written)
    else:
        Path(args.output).write_text(written, encoding="utf-8")
    return 0


def _check_writable(output: str) -> None:
    """Before work that would be lost. What is there stays as it is; a pipe is not opened twice."""
    is_there = os.path.lexists(output)
    if is_there and not os.path.isfile(output) and not os.path.isdir(output):
        return
    try:
        with open(output, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(
            f"--output is {output!r}, which cannot be written ({error.strerror}): a file in a directory that is there "
            "was expected"
        ) from None
    if not is_there:
        os.remove(output)


def _pretrain(args: argparse.Namespace) -> int:
    from albert_fast.pretraining import config, run

    if args.keys:
        print(f"presets: {', '.join(config.preset_names())}\n\n{config.describe()}")
        return 0
    if args.config is None:
        raise ValueError(f"CONFIG is missing; a YAML file or a preset was expected: {', '.join(config.preset_names())}")
    options = config.parse(args.config, args.overrides)
    return run.find_micro_batch(options) if args.find_batch_size else run.train(options)


def _extend(args: argparse.Namespace) -> int:
    from albert_fast.extend import extend

    extend(args.source, args.output, _positive("--positions", args.positions), dtype=args.dtype)
    print(f"wrote {args.output}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from albert_fast.training.plot import plot

    plot(args.runs, args.output, x=args.x)
    print(f"wrote {args.output}")
    return 0


def _positive(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{name} is {value!r}; a number from 1 was expected")
    return int(value)


def _bench(args: argparse.Namespace) -> int:
    from albert_fast.bench import run

    return run.main(args)


def _profile(args: argparse.Namespace) -> int:
    from albert_fast.bench import profile

    return profile.main(args)


def _report(args: argparse.Namespace) -> int:
    from albert_fast.bench import page

    page.write(args.results, args.output, compare=args.compare)
    print(f"wrote {args.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. Errors of the user's input are one line on stderr, status 2; Ctrl-C: 130."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("albert-fast: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "pretrain":
        # argparse takes no positional ones after an option.
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.version:
        import albert_fast

        print(albert_fast.__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    from albert_fast.backends import BackendError

    try:
        return args.run(args)
    except (ValueError, OSError, BackendError) as error:
        print(f"albert-fast {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
