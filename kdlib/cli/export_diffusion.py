"""``kdlib export diffusion``: a diffusion language model as one directory that says how it decodes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdlib.cli.parsing import parse

if TYPE_CHECKING:
    from kdlib.decoding import DiffusionDecoder

DESCRIPTION = """Writes a diffusion language model with its decoding settings, which every kdlib command then decodes it
with: weights, tokenizer, and the settings in config.json under diffusion.decoding. An adapter is merged.

LLaDA, Dream and other published layouts keep their parameter names, so that their own code loads the directory too."""
RECORD = "kdlib_diffusion.json"
OPTIONS = ("gen_length", "block_length", "strategy", "temperature", "cache")
PYTHON = """from kdlib.decoding.diffusion_decoder import decoder_of
from kdlib.diffusion import spec_of
from kdlib.models import load_model, load_tokenizer

model, tokenizer = load_model({path!r}).eval(), load_tokenizer({path!r})
prompts = [tokenizer(text)["input_ids"] for text in ["What is two plus two?"]]
decoder, spec = decoder_of(model.config), spec_of(model.config)
for rows, output in decoder.decode(model, prompts, spec=spec, batch_size=8):
    print(tokenizer.batch_decode(output.sequences[:, -decoder.gen_length:], skip_special_tokens=True))"""


@dataclass
class DiffusionExportArguments:
    """Which model, and how it decodes; what is left out is as the model has it, or else the decoder's default.

    Args:
        model: the diffusion language model: a directory, that of an adapter too, or Hub id.
        output_path: the directory to write; one that holds an export of the same model is replaced.
        gen_length: tokens of a response, with what fills it behind its end.
        block_length: tokens of a block; blocks are finished from left to right.
        strategy: which tokens a pass commits, Name or {Name: {option: value}}: LowConfidence, TopKMargin, ConfidenceThreshold,
            EntropyThreshold, Factor, CoherentContext, Guided, MultiBlock or SlowFast.
        temperature: 0 proposes the likeliest tokens, more draws them.
        cache: what passes reuse of earlier ones: prefix, dual, free or block; none reuses nothing, which is exact.
        trust_remote_code: run the code that a model on the Hub brings, where kdlib has no class for it. Off unless you have
            read it.
    """

    model: str
    output_path: str
    gen_length: int | None = None
    block_length: int | None = None
    strategy: Any = None
    temperature: float | None = None
    cache: Literal["none", "prefix", "dual", "free", "block"] | None = None
    trust_remote_code: bool = False


def run(words: list[str]) -> int:
    options = parse("export diffusion", DESCRIPTION, [DiffusionExportArguments], words)
    if options is None:
        return 0
    decoder = _export(arguments := options.build(DiffusionExportArguments))
    path = os.path.abspath(arguments.output_path)
    lines = [
        f"{path}: decodes with {json.dumps(decoder.to_json())}",
        f"scores  kdlib evaluate --model {path} --tasks gsm8k",
        "python",
        PYTHON.format(path=path),
    ]
    Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)
    return 0


def _export(a: DiffusionExportArguments) -> DiffusionDecoder:
    """How the written model decodes. The directory and the options are checked before a model is loaded."""
    from kdlib import layouts
    from kdlib.drafts.export import written_whole
    from kdlib.models import load_config, load_tokenizer

    path = Path(os.path.abspath(a.output_path))
    record = {"model": os.path.abspath(a.model) if os.path.isdir(a.model) else a.model}
    _check_free(path, record)
    base = _base(a.model)
    decoder = _decoder(a, load_config(base, trust_remote_code=a.trust_remote_code))
    tokenizer = load_tokenizer(a.model, trust_remote_code=a.trust_remote_code)
    model = _loaded(a, base=base, decoder=decoder)
    with written_whole(path) as directory:
        if not layouts.save(model, directory):
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return decoder


def _check_free(path: Path, record: dict[str, str]) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / RECORD).is_file() or json.loads((path / RECORD).read_text()) != record:
        raise ValueError(f"{path} is not empty and no export of this model: choose another output path")


def _base(name: str) -> str:
    """The model whose weights these are: of an adapter the one below it."""
    from peft import PeftConfig

    from kdlib.eval.diffusion_config import is_adapter

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path) if is_adapter(name) else name


def _decoder(a: DiffusionExportArguments, config: Any) -> DiffusionDecoder:
    """The model's own decoder with the options given; ValueError for a model of no diffusion, and options out of range."""
    from kdlib.decoding import DiffusionDecoder
    from kdlib.decoding.diffusion_decoder import decoder_of

    given = {name: getattr(a, name) for name in OPTIONS if getattr(a, name) is not None}
    if a.cache == "none":
        given["cache"] = None
    return DiffusionDecoder.from_json({**decoder_of(config).to_json(), **given})


def _loaded(a: DiffusionExportArguments, *, base: str, decoder: DiffusionDecoder) -> Any:
    """The model, its adapter merged, the settings in its configuration; ValueError where it does not decode with them."""
    from peft import PeftModel

    from kdlib.diffusion import spec_of
    from kdlib.models import load_model

    model: Any = load_model(base, trust_remote_code=a.trust_remote_code)
    if base != a.model:
        model = PeftModel.from_pretrained(model, a.model).merge_and_unload()
    spec = spec_of(model.config)
    written = getattr(model.config, "diffusion", None) or {}  # published models do not have the entry
    model.config.diffusion = {**written, **spec.to_json(), "decoding": decoder.to_json()}
    prompt = [0 if spec.mask_token_id != 0 else 1]
    for _ in replace(decoder, gen_length=1).decode(model.eval(), [prompt], spec=spec, batch_size=1):
        pass  # one token, which refuses what does not go together
    return model
