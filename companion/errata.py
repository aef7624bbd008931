"""Where the five source documents go wrong, and what they got right beside it, as data.

Each erratum has, in its chapter, a cell that shows the failure and one that shows the fix. The
documents are named D1 to D5, as in `companion.claims`. The words are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from companion.checks import require_known


@dataclass(frozen=True)
class Erratum:
    """One mistake, told fairly."""

    id: str
    where: str  # document and section
    wrong: str
    right: str  # what the document meant, or got right
    chapters: tuple[str, ...]  # where it is shown; "book" for the pages around the chapters


_ERRATA = (
    Erratum(
        "E1",
        "D1 3.2, 4.2",
        "DistributedDataParallel is offered as model parallelism; each of its ranks holds the "
        "whole model, and without a process group it cannot be made",
        "a model too large for one device has to be split, and the parts must exchange data",
        ("03",),
    ),
    Erratum(
        "E2",
        "D1 4.1-4.3",
        "the training loops never call optimizer.zero_grad(): gradients pile up over the whole run",
        "the other steps of the loop and their order",
        ("08",),
    ),
    Erratum(
        "E3",
        "D1 4.3",
        "StepLR(step_size=10, gamma=0.1) is stepped once a batch: after 100 batches the rate has "
        "fallen by a factor of 1e10",
        "a rate that falls during training is worth having, and stepped once an epoch this works",
        ("08",),
    ),
    Erratum(
        "E4",
        "D1 4.1, D2 4.4",
        "nn.DataParallel copies the model at every step within one process, and without GPUs does "
        "nothing and says nothing; in D2 the model is never moved to a device",
        "D1 names DistributedDataParallel, its successor, beside it",
        ("02",),
    ),
    Erratum(
        "E5",
        "D1 3.2",
        "P x S leaves communication out, and M x S multiplies a number of parts by a speed to get "
        "a size",
        "both are upper bounds: of the speed P devices can reach, and of what M devices can hold",
        ("02", "03"),
    ),
    Erratum(
        "E6",
        "D1 3.2; D2 3.3; D3 3.2.2; D5 3.1, 4.3, 5.4",
        "one Chinese word, 精度, is accuracy in D1, number format in D2 and D3, and both in D5",
        "each use is common; the words around it tell which is meant",
        ("01",),
    ),
    Erratum(
        "E7",
        "D2 4.1; D3 3.1.2, 4.1.2",
        "nn.KLDivLoss() divides by the number of classes too; dim=1 of (batch, time, vocab) "
        "normalises over time; batchmean of three axes is T times the loss per token; the factor "
        "of temperature squared and the hard-label term are missing; the teacher is never in eval",
        "the direction of the divergence, the temperature on both sides, and in D2 the logarithm "
        "of the student and a teacher without gradients",
        ("04",),
    ),
    Erratum(
        "E8",
        "D2 4.2",
        "prune.l1_unstructured without prune.remove keeps mask and original: the checkpoint grows "
        "and nothing runs faster",
        "the smallest weights of each layer are the ones chosen, and fine-tuning follows",
        ("05",),
    ),
    Erratum(
        "E9",
        "D2 4.3",
        "prepare and convert without quantization stubs: the step called fine-tuning can only "
        "calibrate, the converted model's forward pass fails, and an embedding fails in convert; "
        "the eager interface is on its way out",
        "observing activations before converting is what static quantization needs",
        ("06",),
    ),
    Erratum(
        "E10",
        "D2 2.3, 3.4, 4.4",
        "the tensor from part 1 is never moved to part 2's device, and the parts run one after the "
        "other, not at the same time",
        "inputs and labels do go to the devices of the first and the last part",
        ("03",),
    ),
    Erratum(
        "E11",
        "D3 3.2.2",
        "the prose has low and high precision the wrong way round, loss scaling is missing from "
        "the formula, and Apex amp has become torch.amp",
        "the formula keeps the master weights in FP32, and the code does scale the loss",
        ("07",),
    ),
    Erratum(
        "E12",
        "D3 4.1.1",
        "'weight' in name also prunes norms and embeddings, and without a mask the zeros grow back "
        "in fine-tuning",
        "small magnitude is a fair first guess at what a model can spare",
        ("05",),
    ),
    Erratum(
        "E13",
        "D3 4.1.2",
        "softmax(...).log() gives -inf or NaN on confident logits, where log_softmax does not; the "
        "teacher is untrained, as large as the student, and runs with gradients",
        "the teacher's probabilities are detached, and batchmean fits its two-axis logits",
        ("04",),
    ),
    Erratum(
        "E14",
        "D3 3.2.1, 4.2.1",
        "i is never defined; the formula's sum lacks the 1/k of the code; the last incomplete "
        "group is never applied; beside the large batch it saves memory, not computing",
        "the code divides the loss by the number of steps, which the mean gradient needs",
        ("08",),
    ),
    Erratum(
        "E15",
        "D3 3.2.3",
        "averaging parameters after every step equals averaging gradients only if the update is "
        "linear in the gradient: not for Adam, nor when averaging every k > 1 steps; its own code "
        "averages gradients",
        "for SGD, with momentum or without, the formula is exact",
        ("02",),
    ),
    Erratum(
        "E16",
        "D3 4.2.3",
        "the global rank is used as the local rank, which breaks on a second node; no sampler is "
        "shown, and without one every rank trains on the same data",
        "one process a device, and DistributedDataParallel around the model",
        ("02",),
    ),
    Erratum(
        "E17",
        "D3 4.1.3",
        "parameters are made from uninitialised memory, and SharedLinear is defined but never used",
        "giving two layers the same Parameter object does share it",
        ("08",),
    ),
    Erratum(
        "E18",
        "D4 4.1",
        "a convolutional network for images stands for a language model, F is never imported, and "
        "the promised pruning, quantization and distillation are one comment",
        "the three methods named are the ones that change a model's structure or format",
        ("05",),
    ),
    Erratum(
        "E19",
        "D5 4.1-4.2",
        "the loss lacks its minus sign; the numerator must name y_i, and the denominator range "
        "over y', not x'",
        "a softmax, and the mean of its logarithm over the samples, are the right ingredients",
        ("01",),
    ),
    Erratum(
        "E20",
        "D5 3.2",
        "static and dynamic quantization are told apart by when weights are converted; the "
        "difference is whether the ranges of activations are fixed beforehand or found at run time",
        "there are these two kinds, and one of them works during inference",
        ("06",),
    ),
    Erratum(
        "E21",
        "D5 4.3, 5.2-5.4",
        "model.quantize() does not exist; the second loop's optimizer still holds the old model; "
        "token ids are converted to low precision; int8 parameters are trained; a training loss is "
        "shown as proof of speed",
        "a quantized model has to be compared with the original, in speed and in quality",
        ("06",),
    ),
    Erratum(
        "E22",
        "D5 3.4, 6",
        "fewer parameters are said to raise recognition accuracy, against D5's own list of "
        "drawbacks",
        "a smaller model can answer sooner, which speech in real time needs",
        ("10",),
    ),
    Erratum(
        "E23",
        "D3 4.1.1",
        "threshold = 0.1 on nn.Linear(100, 100), whose weights start within 0.1 of zero: not one "
        "of 10,000 survives",
        "the function does what its formula says",
        ("05",),
    ),
    Erratum(
        "E24",
        "D5 2.6",
        "the chart's last arrow returns to 'initialise model', which throws the training away, and "
        "its decision has one exit",
        "optimising is a loop: train, evaluate, adjust, again",
        ("01",),
    ),
    Erratum(
        "E25",
        "D1 2; D2 2.2; D5 1.1",
        "language models are said to need large labelled data; efficiency is resources over "
        "quality and then to be raised; BERT is counted among models of billions to hundreds of "
        "billions of parameters",
        "D2 1.1 says that pre-training takes plain text; D5's range fits GPT-3 and the largest T5",
        ("01",),
    ),
    Erratum(
        "E26",
        "D1 8 Q1, Q3; D5 3.2",
        "advice that makes it worse: model parallelism for a model too small for data parallelism, "
        "another optimizer for slow inference, distributed training to speed inference up",
        "the causes named are right: work too small to share, and models that grew",
        ("02", "03", "book"),
    ),
)
ERRATA = {each.id: each for each in _ERRATA}


def erratum(id: str) -> Erratum:
    """The erratum with this id. Raises ValueError for an unknown one."""
    require_known("erratum", id, ERRATA)
    return ERRATA[id]


def errata_of(chapter: str) -> list[Erratum]:
    """The errata that a chapter ("01" to "10", or "book") shows."""
    return [each for each in ERRATA.values() if chapter in each.chapters]
