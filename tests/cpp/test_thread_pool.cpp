#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "core/thread_pool.h"
#include "core/trace.h"

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

TEST(an_announced_job_and_one_that_never_comes) {
    set_num_threads(4);
    for (int round = 0; round < 40; round++) {
        if (round % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        expect_job();
        if (round % 3 == 0) continue;
        std::atomic<int> count{0};
        parallel_for(8, 4, [&](int64_t, int) { count++; });
        CHECK_EQUAL(count.load(), 8);
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

TEST(a_trace_has_every_item_and_one_span_per_node_and_thread) {
    set_num_threads(3);
    const std::string names[] = {"two jobs", "no job", "two jobs again"};
    CHECK(!trace_position.trace);
    parallel_for(10, 3, [](int64_t, int) {});  // before the trace: not in it
    std::vector<Trace::Span> spans;
    {
        Trace trace;
        for (const std::string& name : names) {
            TracedNode node(name);
            if (name != "no job")
                for (int job = 0; job < 2; job++)
                    parallel_for(40, 3, [](int64_t, int) { std::this_thread::sleep_for(std::chrono::microseconds(50)); });
        }
        parallel_for(10, 3, [](int64_t, int) {});  // no node's: not in it
        spans = trace.spans();
    }
    CHECK(!trace_position.trace && !trace_position.node);
    for (const std::string& name : names) {
        int64_t items = 0, of_caller = 0;
        for (const Trace::Span& span : spans) {
            if (span.name != name) continue;
            items += span.items, of_caller += span.thread == 0;
            CHECK(span.start_us >= 0 && span.duration_us >= 0 && span.busy_us >= 0 && span.busy_us <= span.duration_us + 0.01);
            CHECK(span.band == -1 && span.pass == -1);
            for (const Trace::Span& other : spans) CHECK(&other == &span || other.name != name || other.thread != span.thread);
        }
        CHECK_EQUAL(items, int64_t(name == "no job" ? 0 : 80));
        CHECK_EQUAL(of_caller, int64_t(1));
    }
    for (size_t i = 1; i < spans.size(); i++) CHECK(spans[i - 1].start_us <= spans[i].start_us);
}

TEST(items_that_run_nodes_are_recorded_on_their_threads) {
    set_num_threads(3);
    const std::string name = "node";
    Trace trace;
    parallel_for(30, 3, [&](int64_t item, int) {
        TraceScope scope({trace_position.trace, trace_position.node, -1, item});
        CHECK(trace_position.begins_nodes());
        TracedNode node(name);
        // What a node does inside is its own: no node in it.
        parallel_for(4, 3, [&](int64_t, int) { CHECK(!trace_position.begins_nodes()); });
    });
    bool seen[30] = {};
    for (const Trace::Span& span : trace.spans()) {
        CHECK(span.pass >= 0 && span.pass < 30);
        seen[span.pass] = true;
    }
    for (bool one : seen) CHECK(one);
    CHECK(!trace_position.node);
}

TEST(calls_traced_side_by_side_do_not_mix) {
    set_num_threads(3);
    std::atomic<int64_t> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++)
        callers.emplace_back([&, caller] {
            const std::string name = std::to_string(caller);
            for (int round = 0; round < 50; round++) {
                Trace trace;
                {
                    TracedNode node(name);
                    parallel_for(20 + caller, 3, [](int64_t, int) {});
                }
                int64_t items = 0;
                for (const Trace::Span& span : trace.spans()) items += span.name == name ? span.items : 1000;
                if (items != 20 + caller) wrong++;
            }
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_EQUAL(wrong.load(), 0);
}
