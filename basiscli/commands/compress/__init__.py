"""`basis compress`: a smaller KV cache, or a smaller adapter."""

from basiscli.cli.command import MAKES_MODEL, Command, OwnMethod

command = Command(
    name="compress",
    help="""Make a model's KV cache smaller (`--kv-ratio`), or a LoRA adapter (`--method nola`).

`basis compress --kv-ratio 0.6` inside a checkpoint folder `m` writes `../m-kv0.6`, which `basiscli.load` opens: trained
orthogonal projections of keys and values. A result can be compressed again at another ratio: its bases stay, only the
ranks are searched. An interrupted run goes on where it stopped when the same command is given again.

`basis compress ADAPTER --method nola --bases 256` makes a LoRA adapter smaller: a seed and two times 256
coefficients a module, of which the report says how much of the adapter's effect they keep.""",
    package=__name__,
    options=".options:CompressOptions",
    variant=".options:variant",
    terminal=MAKES_MODEL,
    makes="model",
    own_methods=(
        OwnMethod(
            "nola",
            "A LoRA adapter as a seed and coefficients of random bases, trained on what the adapter does.",
            "Koohpayegani et al., 'NOLA: Compressing LoRA using Linear Combination of Random Basis', arXiv 2310.02556",
            usage="compress --method nola",
        ),
    ),
    position=20,
)
