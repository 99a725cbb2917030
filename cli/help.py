"""How the command presents itself: verbs in groups, by what people do with them, each with an example."""

from typing import Any

from typer.core import TyperGroup

GROUPS: dict[str, dict[str, str]] = {
    "Recipes": {
        "list": "hybrid list executors",
        "show": "hybrid show hybrid_8b model.hidden_size=2048 --origins",
        "diff": "hybrid diff hybrid_8b mamba2_8b",
        "plan": "hybrid plan nemotron_h_8b --gpu h200 --gpus 64 --search",
    },
    "Training": {
        "pretrain": "hybrid pretrain tiny name=wide model.hidden_size=192 trainer.max_steps*=2",
        "finetune": "hybrid finetune tiny name=chat checkpoint=tiny data.source=sft data.path=chat.jsonl",
        "runs": "hybrid runs --json",
        "status": "hybrid status tiny",
        "logs": "hybrid logs -f tiny",
        "cancel": "hybrid cancel tiny",
        "plot": "hybrid plot tiny wide --output curves.html",
    },
    "Checkpoints and text": {
        "inspect": "hybrid inspect tiny --tensors",
        "convert": "hybrid convert tiny tiny-hf --to hf --verify",
        "generate": 'hybrid generate tiny --prompt "def " --max-tokens 100',
        "serve": "hybrid serve tiny --port 8000",
    },
    "Data and machine": {
        "data": "hybrid data prepare corpus/ --tokenizer byte --output corpus",
        "doctor": "hybrid doctor",
    },
}


class Grouped(TyperGroup):
    """The command's verbs under their headings, each with its whole first sentence."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for examples in GROUPS.values():
            for name, example in examples.items():
                command = self.commands[name]
                for one in (command, *getattr(command, "commands", {}).values()):
                    one.epilog = f"Example: {example}"

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs, group by group."""
        width = max(map(len, self.commands))
        for heading, examples in GROUPS.items():
            rows = [(f"{name:<{width}}", (self.commands[name].help or "").partition("\n")[0]) for name in examples]
            with formatter.section(heading):
                formatter.write_dl(rows)
