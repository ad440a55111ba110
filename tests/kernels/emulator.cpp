// Runs a grid of KERNEL (of SOURCE), cluster by cluster. Shared memory starts as NaN.
#include "emulator.hpp"
#include SOURCE

static const Args* arguments;

static void body() {
    KERNEL(*arguments);
    fibers[current].done = true;
    resume();
}

extern "C" int size_of_arguments() { return sizeof(Args); }

extern "C" void run(const Args* args, int num_blocks) {
    arguments = args;
    static std::vector<std::vector<char>> stacks(THREADS * CLUSTER, std::vector<char>(1 << 16));
    for (first_block = 0; first_block < num_blocks; first_block += CLUSTER) {
        blocks.assign(CLUSTER, Block());
        for (Block& b : blocks) b.memory.assign(sizeof(Shared), 0xff);
        fibers.clear();
        fibers.resize(THREADS * CLUSTER);
        cluster = Barrier();
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& f = fibers[i];
            f.block = i / THREADS, f.thread = i % THREADS;
            getcontext(&f.first);
            f.first.uc_stack.ss_sp = stacks[i].data();
            f.first.uc_stack.ss_size = stacks[i].size();
            makecontext(&f.first, body, 0);
        }
        current = -1;
        if (!_setjmp(finished)) resume();
    }
}
