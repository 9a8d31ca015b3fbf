"""Serve a Q-Former by replaying a CUDA graph (plain calls without a GPU), and time the requests.

python examples/serve_qformer.py                                     # a tiny random model
python examples/serve_qformer.py --model Salesforce/blip2-opt-2.7b --batch 8
"""

import argparse
import time

import torch
import toy_models

from vlm_fast.modules import QFormer


def main() -> tuple[torch.Tensor, torch.Tensor]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--requests", type=int, default=200)
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blip2 = toy_models.blip2(chosen.model)

    # The same parameters, on the fused ops. A graph has a fixed batch size: pad the last batch.
    qformer = QFormer.from_module(blip2.qformer.to(device)).eval()
    width = blip2.config.qformer_config.encoder_hidden_size
    tokens = blip2.vision_model.embeddings.num_positions
    features = torch.randn(chosen.batch, tokens, width, device=device)
    queries = blip2.query_tokens.detach().to(device).repeat(chosen.batch, 1, 1)
    if device == "cuda":
        serve = qformer.capture_graph(queries, features)
    else:
        print("no GPU, so no CUDA graph: these are plain calls")
        serve = lambda queries, image: qformer(queries, None, None, image)[0]  # noqa: E731

    milliseconds = []
    with torch.no_grad():
        for request in range(-10, chosen.requests):  # the first ten warm up
            features = torch.randn_like(features)  # in real use: the output of the vision encoder
            begun = time.perf_counter()
            served = serve(queries, features)
            if device == "cuda":
                torch.cuda.synchronize()  # the next replay overwrites `served`
            if request >= 0:
                milliseconds.append(1e3 * (time.perf_counter() - begun))
        eager = blip2.qformer(queries, encoder_hidden_states=features).last_hidden_state
    shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    percentiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(shares)
    print(
        f"{chosen.batch} pictures, ms: p50 {{:.2f}}, p90 {{:.2f}}, p99 {{:.2f}}".format(
            *percentiles
        )
    )
    print(f"largest difference from transformers' own: {(served - eager).abs().max():.1e}")
    return served, eager


if __name__ == "__main__":
    main()
