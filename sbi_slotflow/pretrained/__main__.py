"""Train a set of weights and write it, and what its training data look like."""
# ruff: noqa: T201

import argparse
from pathlib import Path

import torch

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
    estimator = pretrain(args.name, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.safetensors"
    estimator.save(path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")
    path = args.out / f"{args.name}.reference.safetensors"
    training_reference(args.name).save(path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
