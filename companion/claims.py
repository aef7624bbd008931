"""What the five source documents claim, as data.

D1 to D5 are the documents that this course puts to the test. Each claim gets a verdict in its
chapter, computed from what the reader's machine measured. The words are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from companion.checks import require_known

DOCUMENTS = {
    "D1": "LLM performance: parallelism and accuracy",
    "D2": "Compression, data and model parallelism",
    "D3": "Compression, accumulation, mixed precision, distributed training",
    "D4": "Optimising structure, algorithm and hardware",
    "D5": "Inference speed: compression, quantization, parallelism, hardware",
}


@dataclass(frozen=True)
class Claim:
    """One statement about speed, memory or quality that can be measured."""

    id: str
    says: str  # what the documents say, in short
    where: str  # document and section
    chapter: str  # of the course, two digits


_CLAIMS = (
    Claim("C1", "P devices give P times the speed", "D1 3.2", "02"),
    Claim(
        "C2",
        "data parallelism gains nothing when the model or the batch is too small",
        "D1 8 Q1",
        "02",
    ),
    Claim(
        "C3",
        "the distributed update is the mean over nodes of the parameters each updated",
        "D3 3.2.3",
        "02",
    ),
    Claim(
        "C4",
        "a model in M parts can be M times larger, at the speed of one device",
        "D1 3.2",
        "03",
    ),
    Claim(
        "C5",
        "model parallelism can be slower, because devices exchange data",
        "D1 8 Q2",
        "03",
    ),
    Claim("C6", "a distilled student keeps the quality at lower cost", "D2 2.1, 3.1", "04"),
    Claim(
        "C7",
        "learning the teacher's output distribution carries its knowledge over",
        "D2 3.1, D3 3.1.2",
        "04",
    ),
    Claim(
        "C8",
        "removing small weights lowers complexity, and so time",
        "D2 3.2, D3 3.1, D5 3.1",
        "05",
    ),
    Claim("C9", "fine-tuning restores what pruning cost", "D2 3.2", "05"),
    Claim("C10", "neurons whose activations vary little can go", "D2 3.2", "05"),
    Claim(
        "C11",
        "quantization speeds inference up markedly at a slight loss",
        "D5 4.3, 5.4",
        "06",
    ),
    Claim("C12", "fine-tuning restores what quantization cost", "D2 3.3", "06"),
    Claim("C13", "mixed precision lowers computing cost and memory", "D3 3.2.2", "07"),
    Claim("C14", "gradient accumulation reduces updates and computing cost", "D3 3.2.1", "08"),
    Claim(
        "C15",
        "AdamW, LAMB, Adam, Adagrad and better schedules train faster and better",
        "D1 3.2, D4 3.2",
        "08",
    ),
    Claim("C16", "activations of the ReLU family reduce computing cost", "D4 3.2", "08"),
    Claim("C17", "Huber and Smooth L1 losses make training more efficient", "D4 3.2", "08"),
    Claim(
        "C18",
        "sharing parameters compresses the model, and so training and inference time",
        "D3 3.1, 3.1.3",
        "08",
    ),
    Claim("C19", "fewer parameters make inference faster", "D5 3.1-3.2", "09"),
    Claim("C20", "faster storage speeds training and inference up", "D4 3.3", "01"),
    Claim("C21", "combining methods optimises further", "D5 4.3", "10"),
    Claim("C22", "a Transformer parallelises better than a recurrent network", "D5 2.2", "01"),
    Claim(
        "C23",
        "several cores and distributed computing speed inference up",
        "D5 3.1-3.2",
        "09",
    ),
    Claim("C24", "an accelerator speeds training and inference up", "D4 3.3, D5 3.1", "09"),
    Claim(
        "C25",
        "data parallelism is for much data, model parallelism for a large model",
        "D2 8 Q2",
        "03",
    ),
)
CLAIMS = {each.id: each for each in _CLAIMS}


def claim(id: str) -> Claim:
    """The claim with this id. Raises ValueError for an unknown one."""
    require_known("claim", id, CLAIMS)
    return CLAIMS[id]


def claims_of(chapter: str) -> list[Claim]:
    """The claims that a chapter ("01" to "10") owes a verdict on."""
    return [each for each in CLAIMS.values() if each.chapter == chapter]
