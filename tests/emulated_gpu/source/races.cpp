// The race checker: vector clocks over the host and the streams.
//
// Two uses of the same bytes of device memory, one of them a write, must be ordered: by a stream,
// an event or a wait of the host. Clocks move when operations are submitted, so that a report does
// not depend on what happens to run first.
//
// The host's own uses of pinned memory are seen by protecting its pages while an operation on them
// is queued, that is until the host has waited for it. Of one block the first use is seen.
#include "runtime.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace emulated {

namespace {

constexpr int kHost = 0;
constexpr size_t kMostReports = 50;
constexpr int kRaceStatus = 87;  // of a process that a race ends
constexpr size_t kPage = 4096;

// An access that has been submitted, and the moment in its actor's own count.
struct Record {
  Access access;
  int actor;
  uint64_t time;
};

// A queued operation on pinned memory.
struct PinnedUse {
  Block block;
  Access access;
  int actor;
  uint64_t time;
};

std::mutex races_mutex;
VectorClock host_clock;
std::map<uintptr_t, std::vector<Record>> records;  // by block of device memory
std::vector<PinnedUse> pinned_uses;
struct sigaction previous_action;

int actor_of(const Stream* stream) { return stream->number + 1; }

uint64_t time_in(const VectorClock& clock, int actor) {
  return (size_t)actor < clock.size() ? clock[actor] : 0;
}

void merge(VectorClock& clock, const VectorClock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

void advance(Stream* stream) {
  merge(stream->clock, host_clock);
  size_t actor = (size_t)actor_of(stream);
  if (stream->clock.size() <= actor) stream->clock.resize(actor + 1);
  stream->clock[actor]++;
}

const char* verb(const Access& access) { return access.is_write ? "writes" : "reads"; }

// EMULATED_GPU_RACES=2: the first race ends the process.
void end_if_asked() {
  if (setting("EMULATED_GPU_RACES", 0) > 1) _exit(kRaceStatus);
}

bool overlap(const Access& a, const Access& b) { return a.begin < b.end && b.begin < a.end; }

// Each pair of operations is reported once in a process.
bool is_new(const char* first, const char* second, int actor, int other) {
  static std::set<std::tuple<std::string, std::string, int, int>> seen;
  return seen.size() < kMostReports && seen.insert({first, second, actor, other}).second;
}

void report_race(const Block& block, const Access& access, int actor, const Record& record) {
  const Access& other = record.access;
  if (!is_new(access.label, other.label, actor, record.actor)) return;
  size_t first = std::max(access.begin, other.begin) - block.begin;
  size_t last = std::min(access.end, other.end) - block.begin;
  say("RACE: %s on stream %d %s, and %s on stream %d %s, bytes %zu..%zu of a block of device %d",
      access.label, actor - 1, verb(access), other.label, record.actor - 1, verb(other), first,
      last, block.device);
  end_if_asked();
}

void check_access(Stream* stream, const Block& block, const Access& access) {
  int actor = actor_of(stream);
  auto& block_records = records[block.begin];
  auto is_ordered = [&](const Record& record) {
    return record.actor == actor || record.time <= time_in(stream->clock, record.actor);
  };
  for (const Record& record : block_records) {
    bool is_conflict = record.access.is_write || access.is_write;
    if (is_conflict && overlap(record.access, access) && !is_ordered(record)) {
      report_race(block, access, actor, record);
      break;
    }
  }
  // What is ordered after this access is ordered after those that it covers.
  auto is_covered = [&](const Record& record) {
    bool is_inside =
        access.begin <= record.access.begin && record.access.end <= access.end;
    bool is_weaker = access.is_write || (record.actor == actor && !record.access.is_write);
    return is_inside && is_weaker && is_ordered(record);
  };
  auto end = std::remove_if(block_records.begin(), block_records.end(), is_covered);
  block_records.erase(end, block_records.end());
  block_records.push_back({access, actor, time_in(stream->clock, actor)});
}

// -- pinned memory

// Sets what the host may do with a block: nothing while a device writes it, reading while it reads.
void protect(const Block& block) {
  int rights = PROT_READ | PROT_WRITE;
  for (const PinnedUse& use : pinned_uses) {
    if (use.block.begin != block.begin) continue;
    rights &= use.access.is_write ? PROT_NONE : PROT_READ;
  }
  mprotect((void*)block.begin, (block.size / kPage + 1) * kPage, rights);
}

template <class Condition>
void drop_pinned_uses(Condition condition) {
  std::vector<PinnedUse> dropped;
  for (const PinnedUse& use : pinned_uses) {
    if (condition(use)) dropped.push_back(use);
  }
  auto end = std::remove_if(pinned_uses.begin(), pinned_uses.end(), condition);
  pinned_uses.erase(end, pinned_uses.end());
  for (const PinnedUse& use : dropped) protect(use.block);
}

void report_host_use(const PinnedUse& use) {
  const char* host_use = use.access.is_write ? "reads or writes" : "writes";
  if (!is_new("host", use.access.label, kHost, use.actor)) return;
  say("RACE: the host %s pinned memory, and %s on stream %d, still queued, %s it", host_use,
      use.access.label, use.actor - 1, verb(use.access));
  end_if_asked();
}

// A use of a protected page. The host goes on after the report, without protection.
void handle_fault(int number, siginfo_t* info, void* context) {
  uintptr_t address = (uintptr_t)info->si_addr;
  bool is_own = false;
  {
    std::lock_guard<std::mutex> lock(races_mutex);
    auto is_hit = [&](const PinnedUse& use) {
      size_t size = (use.block.size / kPage + 1) * kPage;
      return use.block.begin <= address && address < use.block.begin + size;
    };
    auto hit = std::find_if(pinned_uses.begin(), pinned_uses.end(), is_hit);
    is_own = hit != pinned_uses.end();
    if (is_own) {
      report_host_use(*hit);
      drop_pinned_uses(is_hit);
    }
  }
  if (is_own) return;
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(number, info, context);
    return;
  }
  signal(number, SIG_DFL);  // the same instruction faults again, and ends the process
}

void watch_faults() {
  static bool is_installed = false;
  if (is_installed) return;
  is_installed = true;
  struct sigaction action = {};
  action.sa_sigaction = handle_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_action);
}

void note_pinned_use(Stream* stream, const Block& block, const Access& access) {
  if (block.stream_view == (char*)block.begin) return;  // registered, without a second mapping
  watch_faults();
  int actor = actor_of(stream);
  pinned_uses.push_back({block, access, actor, time_in(stream->clock, actor)});
  protect(block);
}

}  // namespace

void note_use(Stream* stream, const Accesses& accesses) {
  if (!checks_races()) return;
  std::lock_guard<std::mutex> lock(races_mutex);
  advance(stream);
  for (const Access& access : accesses) {
    Block block;
    if (access.begin == access.end || !find_block((void*)access.begin, &block)) continue;
    check_access(stream, block, access);
    if (block.is_pinned) note_pinned_use(stream, block, access);
  }
}

void note_record(Event* event, Stream* stream) {
  if (!checks_races()) return;
  std::lock_guard<std::mutex> lock(races_mutex);
  advance(stream);
  event->clock = stream->clock;
}

void note_stream_wait(Stream* stream, Event* event) {
  if (!checks_races()) return;
  std::lock_guard<std::mutex> lock(races_mutex);
  merge(stream->clock, event->clock);
}

void note_host_wait(const VectorClock& clock) {
  if (!checks_races()) return;
  std::lock_guard<std::mutex> lock(races_mutex);
  merge(host_clock, clock);
  drop_pinned_uses([](const PinnedUse& use) { return use.time <= time_in(host_clock, use.actor); });
}

VectorClock clock_of(const Stream* stream) {
  std::lock_guard<std::mutex> lock(races_mutex);
  return stream->clock;
}

VectorClock clock_of(const Event* event) {
  std::lock_guard<std::mutex> lock(races_mutex);
  return event->clock;
}

bool host_has_waited_for(const Event* event) {
  if (!checks_races()) return true;
  std::lock_guard<std::mutex> lock(races_mutex);
  for (size_t actor = 0; actor < event->clock.size(); actor++) {
    if (event->clock[actor] > time_in(host_clock, (int)actor)) return false;
  }
  return true;
}

void forget_block(const Block& block) {
  std::lock_guard<std::mutex> lock(races_mutex);
  records.erase(block.begin);
  drop_pinned_uses([&](const PinnedUse& use) { return use.block.begin == block.begin; });
}

}  // namespace emulated
