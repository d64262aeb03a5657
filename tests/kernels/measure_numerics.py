"""Print the numerics table of kernels/README.md: errors against float64 of bf16 inputs, on a CPU.

`python tests/kernels/measure_numerics.py` takes about a minute. What a GPU rounds and this CPU does
not, the kept int16 logits and the bfloat16 dlogits, is applied to exact values ("emulated").
"""

import torch

from laser_kernels import linear_logprob, linear_logprob_loss, reference

N, V, D = 192, 32768, 256


def make_head(max_logit):
    torch.manual_seed(0)
    weight = torch.randn(V, D) / 4
    labels = torch.randint(V, (N,))
    hidden_states = torch.randn(N, D)
    hidden_states[::2] += 3 * weight[labels[::2]]
    hidden_states *= max_logit / (hidden_states @ weight.T).abs().max()
    return hidden_states.bfloat16(), weight.bfloat16(), labels


def gradients_from(dlogits, hidden_states, weight):
    """Return dH, dW as the GEMMs would, each rounded to bfloat16."""
    d = dlogits.bfloat16().double()
    return (d @ weight.double()).bfloat16(), (d.T @ hidden_states.double()).bfloat16()


def rows_of_table(head, g):
    """Yield name, log-probs, dH, dW; the last three may be None."""
    h, w, labels = head
    rows = torch.arange(N)

    def dlogits(logprobs):
        d = -logprobs.exp() * g[:, None]
        d[rows, labels] += g
        return d

    logprobs = torch.log_softmax((h @ w.T).float(), 1)
    yield "bf16 logits", logprobs[rows, labels], *gradients_from(dlogits(logprobs), h, w)

    logits = h.float() @ w.float().T
    logprobs = torch.log_softmax(logits, 1)
    yield (
        "fp32 logits, bf16 dlogits",
        logprobs[rows, labels],
        *gradients_from(dlogits(logprobs), h, w),
    )

    # E = bf16(exp(z - z_y)) goes into the GEMMs; its row factor v = g / S goes into H.
    shifted = logits - logits[rows, labels][:, None]
    total = shifted.exp().sum(1)
    e = shifted.exp()
    e[rows, labels] = 1 - total
    e, v = e.bfloat16().double(), -g / total
    scaled = (v[:, None] * h.float()).bfloat16().double()
    grad_hidden = (v[:, None].double() * (e @ w.double())).bfloat16()
    yield "bf16 E, factor in H", -total.log(), grad_hidden, (e.T @ scaled).bfloat16()

    hg, wg = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_logprob_loss(hg, wg, labels, lambda x, i: (g[i] * x).sum(), impl="chunked")
    grads = torch.autograd.grad(loss, (hg, wg))
    yield "laser_kernels, CPU", linear_logprob(h, w, labels, impl="chunked"), *grads

    x = shifted * 1.4426950408889634
    kept = (x * 512).round().clamp(-(2**15), 2**15 - 1) / 512
    logprobs = (kept - x.exp2().sum(1).log2()[:, None]) * 0.6931471805599453
    d = dlogits(logprobs)
    d[rows, labels] = g * (1 - 1 / total)
    yield "laser_kernels, Triton (emulated)", -total.log(), *gradients_from(d, h, w)


def main():
    print(f"| N={N}, V={V}, D={D} | largest logit | max error of logprob | of dH | of dW |")
    print("|---|---|---|---|---|")
    for max_logit in (30, 70):
        h, w, labels = head = make_head(max_logit)
        g = torch.randn(N)
        hd, wd = h.double().requires_grad_(), w.double().requires_grad_()
        exact = reference.linear_logprob(hd, wd, labels)
        exact_grads = torch.autograd.grad(exact, (hd, wd), g.double())
        for name, logprobs, *grads in rows_of_table(head, g):
            error = (logprobs - exact).abs().max().item()
            relative = [
                ((a.double() - e).norm() / e.norm()).item()
                for a, e in zip(grads, exact_grads, strict=True)
            ]
            print(f"| {name} | {max_logit} | {error:.1e} | {relative[0]:.2e} | {relative[1]:.2e} |")


if __name__ == "__main__":
    main()
