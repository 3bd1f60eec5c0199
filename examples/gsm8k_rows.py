"""GSM8K as conversations: python examples/gsm8k_rows.py ../shared/data/gsm8k runs/gsm8k

Writes train.jsonl and test.jsonl with `messages`, the calculator annotations <<...>> taken out of the answers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]}


def convert(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        (target / f"{split}.jsonl").write_text("".join(json.dumps(conversation(row)) + "\n" for row in rows))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
