// Where the elements of a tensor lie in memory, and which of several tensors share an element. Free of torch.
//
// What this costs grows with the elements of those tensors that lie between one another, as columns do, and with the
// number of tensors; not with the pairs of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace fused_reg {

// A tensor with elements: equal runs of bytes, which lie begin + i * stride apart in each of some dimensions.
class Extent {
 public:
  // Strides in elements, none negative.
  template <class Sizes>
  Extent(uintptr_t begin, size_t element_size, const Sizes& sizes, const Sizes& strides)
      : begin_(begin), element_size_(element_size), run_(element_size) {
    for (size_t d = sizes.size(); d-- > 0;) {
      if (sizes[d] > 1 && strides[d] == 0) {
        overlaps_itself_ = true;
      } else if (sizes[d] > 1 && static_cast<size_t>(strides[d]) * element_size == run_) {
        run_ *= static_cast<size_t>(sizes[d]);  // as all of a contiguous tensor, which needs no memory here
      } else if (sizes[d] > 1) {
        dims_.push_back({static_cast<size_t>(strides[d]) * element_size, static_cast<size_t>(sizes[d])});
      }
    }
    std::sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
    size_t joined = 0;
    for (; joined < dims_.size() && dims_[joined].stride <= run_; ++joined) {
      overlaps_itself_ |= dims_[joined].stride < run_;
      run_ += (dims_[joined].size - 1) * dims_[joined].stride;
    }
    dims_.erase(dims_.begin(), dims_.begin() + static_cast<ptrdiff_t>(joined));
    end_ = begin_ + run_;
    for (const Dim& dim : dims_) {
      is_interleaved_ |= dim.stride < end_ - begin_;
      end_ += (dim.size - 1) * dim.stride;
    }
  }

  uintptr_t begin() const { return begin_; }
  uintptr_t end() const { return end_; }
  size_t element_size() const { return element_size_; }
  size_t run() const { return run_; }  // bytes

  // Two elements have one place in memory.
  bool overlaps_itself() const;

  // body(address) for every run, until it answers true; whether it did.
  template <class Body>
  bool any_run(const Body& body) const {
    return any_run(body, begin_, dims_.size());
  }

 private:
  struct Dim {
    size_t stride;  // bytes
    size_t size;
  };

  template <class Body>
  bool any_run(const Body& body, uintptr_t begin, size_t dims) const {
    if (dims == 0) {
      return body(begin);
    }
    const Dim& outer = dims_[dims - 1];
    for (size_t i = 0; i < outer.size; ++i) {
      if (any_run(body, begin + i * outer.stride, dims - 1)) {
        return true;
      }
    }
    return false;
  }

  uintptr_t begin_, end_;
  size_t element_size_, run_;
  std::vector<Dim> dims_;  // of the runs, by rising strides
  bool overlaps_itself_ = false;
  bool is_interleaved_ = false;  // the runs of a dimension lie between those of another
};

// Marks on the memory from `begin` to `end`, a bit for `unit` bytes.
class Marks {
 public:
  Marks(uintptr_t begin, uintptr_t end, size_t unit)
      : begin_(begin), unit_(unit), words_((end - begin) / unit / kBits + 1) {}

  bool any(const Extent& e) {
    return any_word(e, [](uint64_t& word, uint64_t bits) { return (word & bits) != 0; });
  }

  void set(const Extent& e) {
    any_word(e, [](uint64_t& word, uint64_t bits) { return word |= bits, false; });
  }

  // Until one is set already; whether it was.
  bool set_until_any(const Extent& e) {
    return any_word(e, [](uint64_t& word, uint64_t bits) { return std::exchange(word, word | bits) & bits; });
  }

 private:
  static constexpr size_t kBits = 64;

  // body(word, bits in it), until it answers true.
  template <class Body>
  bool any_word(const Extent& e, const Body& body) {
    return e.any_run([&](uintptr_t run) {
      const size_t last = (run - begin_ + e.run()) / unit_ - 1;
      for (size_t i = (run - begin_) / unit_; i <= last; i = (i / kBits + 1) * kBits) {
        const size_t count = std::min(kBits - i % kBits, last - i + 1);
        if (body(words_[i / kBits], (~uint64_t{0} >> (kBits - count)) << i % kBits)) {
          return true;
        }
      }
      return false;
    });
  }

  uintptr_t begin_;
  size_t unit_;
  std::vector<uint64_t> words_;
};

inline bool Extent::overlaps_itself() const {
  return overlaps_itself_ || (is_interleaved_ && Marks(begin_, end_, element_size_).set_until_any(*this));
}

// Of all pairs of a list that share memory the first one: the least second, and for it the least first. Those from
// `read` on may share it with one another.
template <class Marks = fused_reg::Marks, class AnyExtent>  // a test counts what is marked
std::optional<std::pair<size_t, size_t>> first_shared(const std::vector<AnyExtent>& list, size_t read = SIZE_MAX) {
  std::vector<size_t> by_address(list.size());
  std::iota(by_address.begin(), by_address.end(), size_t{0});
  std::sort(by_address.begin(), by_address.end(),
            [&](size_t a, size_t b) { return list[a].begin() < list[b].begin(); });
  std::optional<std::pair<size_t, size_t>> first;
  std::vector<size_t> near;
  for (size_t i = 0; i < by_address.size();) {
    // Those whose ranges of memory are connected.
    const uintptr_t begin = list[by_address[i]].begin();
    uintptr_t end = begin;
    size_t unit = 0;
    near.clear();
    for (; i < by_address.size() && (near.empty() || list[by_address[i]].begin() < end); ++i) {
      const Extent& e = list[by_address[i]];
      near.push_back(by_address[i]);
      end = std::max(end, e.end());
      unit = std::gcd(unit, std::gcd(e.begin() - begin, e.element_size()));
    }
    if (near.size() == 1) {
      continue;
    }
    std::sort(near.begin(), near.end());
    Marks before(begin, end, unit);
    for (const size_t second : near) {
      if (first && second > first->second) {
        break;
      }
      if (!before.any(list[second])) {
        if (second < read) {
          before.set(list[second]);
        }
        continue;
      }
      Marks own(begin, end, unit);
      own.set(list[second]);
      first = {*std::find_if(near.begin(), near.end(), [&](size_t other) { return own.any(list[other]); }), second};
      break;
    }
  }
  return first;
}

}  // namespace fused_reg
