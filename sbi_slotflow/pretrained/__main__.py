"""Train a set of weights and write it, and what its training data look like."""
# ruff: noqa: T201

import argparse
from pathlib import Path

import torch

from ..calibration import TrainingReference
from ..nn.estimator import SlotDensityEstimator
from ..storage import check_tensors_replaceable
from .recipes import RECIPES, pretrain, training_reference


def main() -> None:
    """Train the weights that were asked for and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/weights"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    weights = args.out / f"{args.name}.safetensors"
    reference = args.out / f"{args.name}.reference.safetensors"
    # Before the training: it takes hours.
    for path, made in ((weights, SlotDensityEstimator), (reference, TrainingReference)):
        check_tensors_replaceable(path, f"sbi_slotflow.{made.__name__}")
    pretrain(args.name, device=args.device).save(weights)
    training_reference(args.name).save(reference)
    for path in (weights, reference):
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
