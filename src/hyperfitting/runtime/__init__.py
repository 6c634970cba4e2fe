"""The machine and the processes: device, distributed training, preemption, memory, kernels."""
