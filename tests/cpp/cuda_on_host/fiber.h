// A thread of a CTA: a function on a stack of its own, which runs until it yields.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

namespace cuda_on_host {

// Fibers take several times as long then.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

class Fiber {
 public:
  explicit Fiber(const std::function<void()>& body) : body_(body) {
    if (stacks.empty()) {
      stacks.push_back(std::make_unique<char[]>(kStack));
    }
    stack_ = std::move(stacks.back());
    stacks.pop_back();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = &scheduler_;
    makecontext(&context_, &Fiber::enter, 0);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { stacks.push_back(std::move(stack_)); }

  bool is_done() const { return is_done_; }
  bool has_on_stack(const void* p) const { return p >= stack_.get() && p < stack_.get() + kStack; }

  // swapcontext() asks the kernel for the mask of signals twice, and takes ten times as long as what replaces it here,
  // where no sanitizer watches the stacks. (A longjmp from stack to stack is what _FORTIFY_SOURCE would stop.)
#ifdef __SANITIZE_ADDRESS__
  // Until it yields or is done.
  void resume() {
    running_ = this;
    swapcontext(&scheduler_, &context_);
  }
  void yield() { swapcontext(&context_, &scheduler_); }
#else
  void resume() {
    running_ = this;
    if (_setjmp(scheduler_jump_) == 0) {
      if (has_begun_) {
        _longjmp(jump_, 1);
      }
      has_begun_ = true;
      setcontext(&context_);
    }
  }
  void yield() {
    if (_setjmp(jump_) == 0) {
      _longjmp(scheduler_jump_, 1);
    }
  }
#endif

 private:
  static constexpr size_t kStack = 256 << 10;
  static inline std::vector<std::unique_ptr<char[]>> stacks;  // that are free
  static inline Fiber* running_;
  static inline ucontext_t scheduler_;

  static void enter() {
    running_->body_();
    running_->is_done_ = true;
#ifndef __SANITIZE_ADDRESS__
    _longjmp(scheduler_jump_, 1);
#endif
  }

#ifndef __SANITIZE_ADDRESS__
  static inline jmp_buf scheduler_jump_;
  jmp_buf jump_;
  bool has_begun_ = false;
#endif
  const std::function<void()>& body_;
  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
  bool is_done_ = false;
};

}  // namespace cuda_on_host
