"""Train BLIP-2's first stage on several processes, with negatives from all of their batches.

torchrun --nproc_per_node 2 examples/train_blip2_stage1.py     # a tiny random model; gloo or NCCL
torchrun --nproc_per_node 8 examples/train_blip2_stage1.py --batch 100 --lr 1e-4 --epochs 10 \
    --model FOLDER --data conversations.json --images pictures # of a Blip2ForImageTextRetrieval
"""

import argparse

import torch
import toy_models
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vlm_fast.training.losses import LanguageModelHead, freeze, stage1_loss


class Stage1(torch.nn.Module):
    """The model and its three losses in one forward, as DistributedDataParallel requires."""

    def __init__(self, model):
        super().__init__()
        freeze(model.vision_model)
        self.model, words = model, model.embeddings.word_embeddings
        self.head, self.decode = LanguageModelHead(words), words.num_embeddings - 1  # LAVIS' [DEC]
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))

    def forward(self, pixel_values, **text):
        with torch.no_grad():
            image = self.model.vision_model(pixel_values).last_hidden_state
        options = dict(bos_token_id=self.decode, temperature=self.temperature, lm_head=self.head)
        return stage1_loss(self.model, image, **text, **options)


def main() -> None:
    parser, own = argparse.ArgumentParser(), dict(model="", data="", images="", output="stage1")
    for name, default in dict(own, batch=8, epochs=6, lr=2e-3).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    chosen = parser.parse_args()
    model, pairs, collate = toy_models.retrieval(chosen.model, chosen.data, chosen.images)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    loader = DataLoader(pairs, chosen.batch, shuffle=True, drop_last=True, collate_fn=collate)
    stage1 = Stage1(model.train())
    optimizer = torch.optim.AdamW(stage1.parameters(), chosen.lr)
    stage1, optimizer, loader = accelerator.prepare(stage1, optimizer, loader)
    for epoch in range(chosen.epochs):
        for batch in loader:
            optimizer.zero_grad()
            losses = stage1(**batch)
            accelerator.backward(losses.loss)
            optimizer.step()
        words = (f"{name} {value.item():.3f}" for name, value in losses._asdict().items())
        accelerator.print(f"epoch {epoch} on {accelerator.num_processes} processes:", *words)
    if accelerator.is_main_process:
        accelerator.unwrap_model(stage1).model.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
