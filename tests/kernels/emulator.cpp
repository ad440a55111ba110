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

extern "C" void change(void* to, const void* before, const void* after, size_t size) {
    written_before = {to, before, after, size};
}

// Returns how many threads have not ended, or not waited for the launch before. A grid without clusters may have another
// order of its blocks.
extern "C" int run(const Args* args, int num_blocks, const int* order) {
    int faults = 0;
    arguments = args;
    static std::vector<std::vector<char>> stacks(THREADS * CLUSTER, std::vector<char>(1 << 16));
    for (int turn = 0; turn < num_blocks; turn += CLUSTER) {
        first_block = order ? order[turn] : turn;
        blocks.assign(CLUSTER, Block());
        for (Block& b : blocks) b.memory.assign(sizeof(Shared), 0xff);
        fibers.clear();
        fibers.resize(THREADS * CLUSTER);
        cluster = Barrier();
        memcpy(written_before.to, written_before.before, written_before.size);
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& f = fibers[i];
            f.block = i / THREADS, f.thread = i % THREADS;
            getcontext(&f.first);
            f.first.uc_stack.ss_sp = stacks[i].data();
            f.first.uc_stack.ss_size = stacks[i].size();
            makecontext(&f.first, body, 0);
        }
        current = 0;
        if (!_setjmp(finished)) resume();
        for (const Fiber& f : fibers) faults += !f.done || !f.waited;
    }
    return faults;
}
