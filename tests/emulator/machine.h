// A GPU of the mind: blocks of threads on one CPU thread, which take turns wherever they would wait.
//
// A thread is a fiber. Whoever waits for a barrier, a counter or the rest of a warp gives way to the next one, and is passed over
// while what it waits for has not come; when nobody can go on, that is a deadlock and is reported. Bulk copies end some random
// turns after they were started, so that a kernel which does not wait for one is found out. What a thread itself starts and waits
// for, products and small copies, happens when it is waited for, or with other seeds as soon as it is started.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

// A barrier in shared memory: arrivals and bytes that a phase still waits for.
struct Barrier {
    int count = 0, arrivals = 0;
    long bytes = 0;
    uint32_t phase = 0;
};

// A place where a number of threads meet.
struct Meeting {
    int there = 0;
    uint32_t times = 0;
};

struct Warp : Meeting {
    uint32_t words[32][8];  // what lanes show each other
};

struct Block : Meeting {
    Meeting parts[16];  // of the block's threads
    std::vector<uint8_t> memory;
    uint8_t* shared;  // aligned
    std::unordered_map<uint64_t, Barrier> barriers;  // by their offset in shared memory
    std::vector<Warp> warps;
    int running;  // threads
};

// What a thread has started, in groups, and not waited for.
struct Groups {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> closed;

    void start(std::function<void()> what);
    void close() { closed.push_back(std::move(open)), open.clear(); }
    bool runs(size_t left) const { return closed.size() > left && !closed.front().empty(); }
    void wait(size_t left) {
        for (; closed.size() > left; closed.pop_front())
            for (auto& what : closed.front()) what();
    }
};

struct Fiber {
    void* stack_pointer;
    std::vector<uint8_t> stack;
    int block, thread;
    bool done;
    const uint32_t* watched = nullptr;  // it waits while this number is `value`, or (at_least) below it
    uint32_t value = 0;
    bool at_least = false;
    Groups products, copies;
    bool waits() const { return watched && (at_least ? *watched < value : *watched == value); }
};

struct Machine {
    int threads, cluster;  // of a block; blocks
    bool early;            // groups are not late
    std::vector<Block> blocks;
    std::vector<Meeting> clusters;
    std::vector<Fiber> fibers;
    std::vector<std::function<void()>> copies;  // on their way
    std::function<void()> kernel;
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    uint64_t progress = 0;
    std::string error;

    Block& block() { return blocks[current->block]; }
    int lane() const { return current->thread % 32; }
    int rank() const { return current->block % cluster; }
    int neighbour(int rank) const { return current->block / cluster * cluster + rank; }
    uint64_t offset(const void* p) { return uint64_t(static_cast<const uint8_t*>(p) - block().shared); }
};

inline Machine machine;

inline void Groups::start(std::function<void()> what) {
    if (machine.early)
        what();
    else
        open.push_back(std::move(what));
}

extern "C" void emulator_switch(void** from, void* to);

inline void give_way() { emulator_switch(&machine.current->stack_pointer, machine.scheduler); }

// Until the number is another one than `value`, or (at_least) no smaller one.
inline void wait_while(const uint32_t* number, uint32_t value, bool at_least = false) {
    Fiber& fiber = *machine.current;
    fiber.watched = number, fiber.value = value, fiber.at_least = at_least;
    while (fiber.waits()) give_way();
    fiber.watched = nullptr;
}

// Ends the run, from inside a thread.
inline void fail(const std::string& why) {
    if (machine.error.empty()) machine.error = why;
    for (;;) give_way();
}

inline void expect(bool holds, const char* why) {
    if (!holds) fail(why);
}

inline void arrive(Meeting& meeting, int threads) {
    if (++meeting.there == threads) meeting.there = 0, ++meeting.times, ++machine.progress;
}

inline void meet(Meeting& meeting, int threads) {
    const uint32_t before = meeting.times;
    arrive(meeting, threads);
    wait_while(&meeting.times, before);
}

inline Warp& warp() { return machine.block().warps[machine.current->thread / 32]; }
inline void meet_warp() { meet(warp(), 32); }

inline Barrier& barrier(int block, uint64_t offset) {
    auto& known = machine.blocks[block].barriers;
    expect(known.count(offset), "a barrier that nobody has initialised");
    expect(machine.blocks[block].running, "a barrier of a block that has ended");
    return known[offset];
}

inline void end_phase_if_complete(Barrier& b) {
    ++machine.progress;
    if (b.arrivals == 0 && b.bytes == 0) b.phase ^= 1, b.arrivals = b.count;
}

inline void arrive(int block, uint64_t offset) {
    Barrier& b = barrier(block, offset);
    expect(b.arrivals > 0, "more arrivals than a barrier expects");
    --b.arrivals;
    end_phase_if_complete(b);
}

// Of a copy to a block.
inline void end_copy(int block, Barrier& b, uint32_t bytes) {
    if (!machine.blocks[block].running && machine.error.empty()) machine.error = "a copy to a block that has ended";
    b.bytes -= bytes;
    end_phase_if_complete(b);
}

// Copies between memories of any block; `bytes` arrive at the barrier of the block that they are for.
inline void copy(uint8_t* to, const void* from, uint32_t bytes, int block, uint64_t barrier_offset) {
    expect(bytes % 16 == 0 && uint64_t(from) % 16 == 0 && uint64_t(to) % 16 == 0, "a bulk copy at no multiple of 16 bytes");
    Barrier* b = &barrier(block, barrier_offset);
    machine.copies.push_back([=] {
        std::memcpy(to, from, bytes);
        end_copy(block, *b, bytes);
    });
}

inline void begin_thread() {
    machine.kernel();
    machine.current->done = true;
    if (!--machine.block().running)
        for (const Meeting& part : machine.block().parts) expect(part.there == 0, "a block that ended before all of a part met");
    ++machine.progress;
    for (;;) give_way();
}

// Runs a kernel; throws std::runtime_error for a deadlock, or what `fail` was told.
inline void launch(int blocks, int threads, int cluster, size_t shared_bytes, unsigned seed, std::function<void()> kernel) {
    constexpr size_t kStack = 48 << 10;
    machine = Machine{};
    machine.threads = threads, machine.cluster = cluster, machine.early = seed / 2 % 2, machine.kernel = std::move(kernel);
    machine.blocks.resize(blocks), machine.clusters.resize(blocks / cluster), machine.fibers.resize(blocks * threads);
    for (Block& block : machine.blocks) {
        block.memory.assign(shared_bytes + 1024, 0xFF);  // NaN, in all formats
        block.shared = block.memory.data() + (1024 - uint64_t(block.memory.data()) % 1024) % 1024;
        block.warps.resize(threads / 32), block.running = threads;
    }
    for (int i = 0; i < blocks * threads; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.block = i / threads, fiber.thread = i % threads, fiber.done = false;
        fiber.stack.resize(kStack);
        void** top = reinterpret_cast<void**>(uint64_t(fiber.stack.data() + kStack) & ~uint64_t(63));
        *--top = nullptr, *--top = reinterpret_cast<void*>(begin_thread);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        fiber.stack_pointer = top;
    }
    std::mt19937 random(seed);
    const unsigned slowness = seed % 2 ? 40 : 3;  // of copies, in turns
    int left = blocks * threads, quiet = 0;
    while (left) {
        const uint64_t before = machine.progress;
        const size_t first = random() % machine.fibers.size();
        left = 0;
        for (size_t i = 0; i < machine.fibers.size(); ++i) {
            Fiber& fiber = machine.fibers[(first + i) % machine.fibers.size()];
            if (fiber.done) continue;
            machine.current = &fiber;
            if (!fiber.waits()) emulator_switch(&machine.scheduler, fiber.stack_pointer);
            left += !fiber.done;
        }
        std::vector<std::function<void()>> under_way;
        under_way.swap(machine.copies);
        for (auto& copied : under_way)
            if (random() % slowness)
                machine.copies.push_back(copied);
            else
                copied();
        quiet = machine.progress == before && machine.copies.empty() ? quiet + 1 : 0;
        if (left && quiet > 20 && machine.error.empty()) machine.error = "deadlock: " + std::to_string(left) + " threads wait";
        if (!machine.error.empty()) throw std::runtime_error(machine.error);
    }
}

}  // namespace emulator
