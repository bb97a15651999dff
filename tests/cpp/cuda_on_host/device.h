// The device: streams of launches, whose CTAs run a bit at a time, those of several launches and streams in an order
// drawn at random; and graphs of what is captured.
#pragma once

#include <deque>
#include <list>
#include <mutex>
#include <optional>

#include "cta.h"

namespace cuda_on_host {

// What tests choose and see.
inline int multiprocessors = 2;
inline int launches = 0;
inline bool is_deferred = false;  // launches run when the host waits for them, or when it is drawn; else at once
inline size_t resident_ctas = 3;  // at a time, of all launches
inline std::function<void()> after_cta = [] {};

// A point in a stream, which another stream can wait for.
struct Event {
  bool is_pending = false;
  std::vector<uint32_t> after;
};

// What follows on one another in a stream: a launch, or something else that takes no time.
struct Operation {
  std::optional<Grid> grid;
  std::function<void()> action;
  Event* waits_for = nullptr;
  std::vector<uint32_t> after;  // what the host has waited for
};

}  // namespace cuda_on_host

// What was captured, what it owns, and the pool of its memory.
struct cuda_on_host_object;
struct cuda_on_host_graph {
  static inline size_t pools = 0;
  std::vector<cuda_on_host::Operation> operations;
  std::vector<cuda_on_host_object*> objects;
  size_t pool = ++pools;
};

namespace cuda_on_host {

inline cuda_on_host_graph* captured = nullptr;  // the graph that takes what is captured; null: all runs
inline size_t current_pool = 0;                 // of what is not captured

class Device {
 public:
  void enqueue(size_t stream, Operation operation) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (captured != nullptr) {
      captured->operations.push_back(std::move(operation));
      return;
    }
    operation.after = host_.after;
    if (stream >= streams_.size()) {
      streams_.resize(stream + 1);
    }
    streams_[stream].operations.push_back(std::move(operation));
    if (!is_deferred) {
      synchronize();
    } else if (draw() % 4 == 0) {
      finish(draw() % streams_.size());
    }
  }

  void launch(size_t stream, Grid grid) { enqueue(stream, {std::move(grid), {}, nullptr, {}}); }
  void run(size_t stream, std::function<void()> action) { enqueue(stream, {{}, std::move(action), nullptr, {}}); }

  void record(size_t stream, Event* event) {
    event->is_pending = true;
    run(stream, [this, stream, event] {
      event->is_pending = false;
      event->after = streams_[stream].order.after;
    });
  }
  void wait(size_t stream, Event* event) {
    enqueue(stream, {{}, [this, stream, event] { streams_[stream].order.join(event->after); }, event, {}});
  }

  // The host waits for all streams, or for one.
  void synchronize() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (size_t s = 0; s < streams_.size(); ++s) {
      synchronize(s);
    }
  }
  void synchronize(size_t stream) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (stream < streams_.size()) {
      finish(stream);
      host_.join(streams_[stream].order.after);
    }
  }

  void replay(size_t stream, const cuda_on_host_graph& graph) {
    for (const Operation& operation : graph.operations) {
      enqueue(stream, operation);
    }
  }

 private:
  // A launch whose CTAs run.
  struct Launch {
    std::vector<unsigned> to_come;
    std::list<Cta> ctas;
    std::shared_ptr<Released> released;
  };
  struct Stream {
    std::deque<Operation> operations;
    std::optional<Launch> launch;  // the first of them
    Order order;
  };

  // All that a stream has to do, and what has begun on others by then.
  void finish(size_t stream) {
    const auto waits = [&] { return !streams_[stream].operations.empty(); };
    const auto has_begun = [](const Stream& s) { return s.launch.has_value(); };
    while (waits() || std::any_of(streams_.begin(), streams_.end(), has_begun)) {
      advance(waits());
    }
    SharedMemory::give_back_to_host();
  }

  // A bit of what comes next in a stream that is drawn; of a new launch where `may_begin`.
  void advance(bool may_begin) {
    std::vector<size_t> ready;
    for (size_t s = 0; s < streams_.size(); ++s) {
      const Stream& stream = streams_[s];
      const bool can_begin =
          may_begin && !stream.operations.empty() &&
          (stream.operations.front().waits_for == nullptr || !stream.operations.front().waits_for->is_pending);
      if (stream.launch.has_value() || can_begin) {
        ready.push_back(s);
      }
    }
    if (ready.empty()) {
      fail("every stream waits for an event of another one");
    }
    const size_t s = ready[draw() % ready.size()];
    Stream& stream = streams_[s];
    if (!stream.launch.has_value()) {
      begin(s);
    }
    if (stream.launch.has_value()) {
      advance(&stream);
    }
  }

  void begin(size_t s) {
    Stream& stream = streams_[s];
    Operation& operation = stream.operations.front();
    stream.order.join(operation.after);
    if (!operation.grid.has_value()) {
      const std::function<void()> action = std::move(operation.action);
      stream.operations.pop_front();
      action();
      return;
    }
    ++launches;
    stream.order.stream = s;
    ++stream.order.number;
    Launch& launch = stream.launch.emplace();
    launch.to_come.resize(operation.grid->ctas);
    std::iota(launch.to_come.begin(), launch.to_come.end(), 0u);
    std::shuffle(launch.to_come.begin(), launch.to_come.end(), draw);
  }

  void advance(Stream* stream) {
    Launch& launch = *stream->launch;
    std::list<Cta>& ctas = launch.ctas;
    if (!launch.to_come.empty() && (ctas.empty() || (ctas.size() < resident_ctas && draw() % 2 == 0))) {
      ctas.emplace_back(*stream->operations.front().grid, launch.to_come.back(), stream->order, &launch.released);
      launch.to_come.pop_back();
    }
    const auto cta = std::next(ctas.begin(), draw() % ctas.size());
    cta->run();
    if (!cta->is_done()) {
      return;
    }
    ctas.erase(cta);
    after_cta();
    if (ctas.empty() && launch.to_come.empty()) {
      stream->launch.reset();
      stream->operations.pop_front();
      std::vector<uint32_t> done(stream->order.stream + 1);
      done.back() = stream->order.number;
      stream->order.join(done);
    }
  }

  std::recursive_mutex mutex_;
  std::deque<Stream> streams_;
  Order host_;  // what it has waited for
};

inline Device device;

}  // namespace cuda_on_host
