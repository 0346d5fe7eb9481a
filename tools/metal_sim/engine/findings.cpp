// What went wrong, once for each place and kind, with the thread it was seen on. A new finding is returned, so that
// more can be said of it.
#include "engine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// Findings of one kind at one place differ in their numbers only.
static bool alike(const char* a, const char* b) {
  for (;;) {
    while (*a >= '0' && *a <= '9') a++;
    while (*b >= '0' && *b <= '9') b++;
    if (*a != *b) return false;
    if (!*a) return true;
    a++, b++;
  }
}

Finding* find(const void* code, const char* format, ...) {
  char text[sizeof(Finding::text)];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Launch& launch = *engine.launch;
  for (uint32_t i = 0; i < launch.n_findings; i++)
    if (launch.findings[i].code == code && alike(launch.findings[i].text, text)) {
      launch.findings[i].count++;
      return nullptr;
    }
  if (launch.n_findings == MAX_FINDINGS) return nullptr;
  Finding& finding = launch.findings[launch.n_findings++];
  memcpy(finding.text, text, sizeof text);
  finding.code = code;
  finding.other = nullptr;
  finding.count = 1;
  finding.located = engine.current != nullptr;
  if (!engine.current) return &finding;
  finding.thread = engine.current->index;
  for (int d = 0; d < 3; d++) finding.group[d] = engine.current->place.threadgroup_position_in_grid[d];
  return &finding;
}

void abandon_launch() { siglongjmp(engine.abandon, 1); }
