// Connections between the ranks of an emulated NCCL communicator, on one machine.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

namespace emulated {

// The peer has gone, and this communicator was aborted: its operations end.
struct Aborted {};

class Connections {
 public:
  Connections(std::string id, int rank, int size, int device);

  // Waits for all other ranks, without a timeout. Returns false if a name cannot be taken.
  bool connect();

  // Both wait. A peer that is gone is waited for without end, as a kernel does, until `abort`, and
  // then they throw Aborted. With `gives_up` they return false instead.
  bool write_to(int socket, const void* data, size_t size, bool gives_up = false);
  bool read_from(int socket, void* data, size_t size, bool gives_up = false);

  void abort();
  void close_all();

  int in(int rank) const { return in_[rank]; }    // what a rank sends here
  int out(int rank) const { return out_[rank]; }  // what is sent to a rank
  bool shares_device() const { return shares_device_; }

 private:
  void accept_all();
  bool lose_peer(bool gives_up);

  std::string id_;
  int rank_, size_, device_;
  int listener_ = -1;
  std::vector<int> in_, out_;
  bool shares_device_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_aborted_ = false;
};

}  // namespace emulated
