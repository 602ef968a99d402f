#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "core/thread_pool.h"

using namespace sparse_engine;

TEST(every_item_runs_exactly_once) {
    for (int threads : {1, 2, 3, 8}) {
        set_num_threads(threads);
        for (int64_t items : {0, 1, 2, 3, 17, 1000}) {
            std::vector<std::atomic<int>> runs(static_cast<size_t>(items));
            parallel_for(items, threads, [&](int64_t item, int) { runs[static_cast<size_t>(item)]++; });
            for (auto& count : runs) CHECK_EQUAL(count.load(), 1);
        }
    }
}

TEST(slots_are_unique_among_the_threads_of_a_job) {
    set_num_threads(4);
    for (int round = 0; round < 200; round++) {
        std::atomic<int> in_use[kMaxThreads] = {};
        std::atomic<bool> shared{false}, out_of_range{false};
        parallel_for(64, 4, [&](int64_t, int slot) {
            if (slot < 0 || slot >= 4) {
                out_of_range = true;
                return;
            }
            if (in_use[slot].fetch_add(1) != 0) shared = true;
            std::this_thread::yield();
            in_use[slot].fetch_sub(1);
        });
        CHECK(!shared.load());
        CHECK(!out_of_range.load());
    }
}

TEST(what_a_job_wrote_is_seen_when_it_returns) {
    set_num_threads(4);
    std::vector<int64_t> values(512);  // plain memory: the thread sanitizer sees a missing happens-before
    for (int64_t round = 0; round < 500; round++) {
        parallel_for(512, 4, [&](int64_t item, int) { values[static_cast<size_t>(item)] = item * round; });
        int64_t sum = 0;
        for (int64_t value : values) sum += value;
        CHECK_EQUAL(sum, round * 511 * 512 / 2);
    }
}

TEST(several_callers_at_once_each_get_their_own_job) {
    set_num_threads(3);
    std::vector<std::thread> callers;
    std::atomic<int64_t> wrong{0};
    for (int caller = 0; caller < 6; caller++) {
        callers.emplace_back([&, caller] {
            std::vector<int64_t> mine(100);
            for (int64_t round = 0; round < 200; round++) {
                parallel_for(100, 3, [&](int64_t item, int) { mine[static_cast<size_t>(item)] = item + caller + round; });
                for (int64_t i = 0; i < 100; i++)
                    if (mine[static_cast<size_t>(i)] != i + caller + round) wrong++;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK_EQUAL(wrong.load(), int64_t(0));
}

TEST(a_job_inside_a_job_finishes) {
    set_num_threads(4);
    std::atomic<int64_t> count{0};
    parallel_for(8, 4, [&](int64_t, int) { parallel_for(16, 4, [&](int64_t, int) { count++; }); });
    CHECK_EQUAL(count.load(), int64_t(8 * 16));
}

TEST(the_number_of_threads_can_change_between_and_during_jobs) {
    std::atomic<bool> stop{false};
    std::thread changer([&] {
        for (int n = 1; !stop.load(); n = n % 5 + 1) {
            set_num_threads(n);
            std::this_thread::yield();
        }
    });
    for (int round = 0; round < 500; round++) {
        std::atomic<int64_t> sum{0};
        parallel_for(50, num_threads(), [&](int64_t item, int) { sum += item; });
        CHECK_EQUAL(sum.load(), int64_t(49 * 50 / 2));
    }
    stop = true;
    changer.join();
    set_num_threads(0);
    CHECK(num_threads() >= 1);
    set_num_threads(2);
    CHECK_EQUAL(num_threads(), 2);
}

TEST(workers_that_sleep_wake_up_again) {
    set_num_threads(4);
    for (int round = 0; round < 20; round++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long past the spinning
        std::atomic<int> count{0};
        parallel_for(40, 4, [&](int64_t, int) { count++; });
        CHECK_EQUAL(count.load(), 40);
    }
}

TEST(more_threads_than_items_and_than_the_pool_allows) {
    set_num_threads(1000);
    CHECK(num_threads() <= kMaxThreads);
    std::atomic<int> highest{0};
    parallel_for(3, 1000, [&](int64_t, int slot) {
        int seen = highest.load();
        while (slot > seen && !highest.compare_exchange_weak(seen, slot)) {
        }
    });
    CHECK(highest.load() < 3);
    set_num_threads(2);
}
