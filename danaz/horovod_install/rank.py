"""One rank of `danaz horovod check`: join the world, sum a vector over it, and print the findings as a line of JSON."""

import json

import horovod.torch as hvd
import torch

from danaz.horovod_install.check import VECTOR


def main() -> None:
    hvd.init()
    devices = [torch.device("cpu")]
    if hvd.nccl_built() and torch.cuda.device_count() >= hvd.local_size():  # NCCL needs one GPU per rank
        devices.append(torch.device("cuda", hvd.local_rank()))
    sums = {}
    for device in devices:
        mine = torch.tensor(VECTOR, device=device) * (hvd.rank() + 1)  # f32[4]
        sums[device.type] = hvd.allreduce(mine, op=hvd.Sum, name=f"check.{device.type}").tolist()
    facts = {
        "size": hvd.size(),
        "gloo": bool(hvd.gloo_built()),
        "mpi": bool(hvd.mpi_built()),
        "nccl": int(hvd.nccl_built()),
        "sums": sums,
    }
    hvd.shutdown()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
