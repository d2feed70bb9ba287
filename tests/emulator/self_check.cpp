// Kernels that are wrong, to see that the machine notices; returns what it said.
#include "cuda/cluster.cuh"
#include "cuda/warpgroup.cuh"

namespace {

using namespace bldm::cuda;

void wait_in_vain() {
    auto* barrier = reinterpret_cast<uint64_t*>(aligned_shared());
    if (threadIdx.x == 0) init_barrier(barrier, 2), arrive(barrier);
    sync_threads<32>();
    wait_for(barrier, 0);
}

void arrive_too_often() {
    auto* barrier = reinterpret_cast<uint64_t*>(aligned_shared());
    if (threadIdx.x == 0) init_barrier(barrier, 1), expect_bytes(barrier, 16);
    sync_threads<32>();
    if (threadIdx.x == 1) arrive(barrier);
}

void copy_anywhere() {
    auto* barrier = reinterpret_cast<uint64_t*>(aligned_shared());
    if (threadIdx.x == 0) init_barrier(barrier, 1), copy_bulk(aligned_shared() + 20, aligned_shared(), 16, barrier);
}

// A copy ends some turns later: who does not wait for it sees what was there.
void read_at_once() {
    uint8_t* shared = aligned_shared();
    auto* barrier = reinterpret_cast<uint64_t*>(shared);
    if (threadIdx.x != 0) return;
    init_barrier(barrier, 1);
    shared[16] = 1, shared[32] = 0;
    expect_bytes(barrier, 16), copy_bulk(shared + 32, shared + 16, 16, barrier);
    if (shared[32] != 1) emulator::fail("read before it was there");
}

void arrive_for_nobody() { arrive_part<64>(2); }

}  // namespace

extern "C" const char* self_check(int which) {
    static std::string error;
    void (*const kernels[])() = {wait_in_vain, arrive_too_often, copy_anywhere, read_at_once, arrive_for_nobody};
    error.clear();
    try {
        emulator::launch(4, 32, 4, 1024, 0, kernels[which]);
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
