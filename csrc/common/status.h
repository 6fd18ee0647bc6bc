// Errors of the core: no exception leaves it, every call returns a Status with a text.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace padkern {

struct Status {
  bool ok = true;
  char message[240] = "";
};

[[gnu::format(printf, 1, 2)]] inline Status error_status(const char* format, ...) {
  Status status;
  status.ok = false;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof(status.message), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace padkern
