#pragma once
#include <sstream>
#include <stdexcept>

namespace fastbert {

// Throws a RuntimeError in Python, its message made of the parts.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fastbert
