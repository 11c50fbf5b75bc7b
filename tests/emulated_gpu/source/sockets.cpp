#include "sockets.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <thread>

namespace emulated {

namespace {

constexpr int kRetryUs = 2000;

// What a rank says first on a connection that it makes.
struct Introduction {
  int rank;
  int device;
};

// An abstract name: it belongs to no file, and ends with its process.
socklen_t make_address(const std::string& id, int rank, sockaddr_un* address) {
  std::string name = "emulated-nccl-" + id + "-" + std::to_string(rank);
  *address = {};
  address->sun_family = AF_UNIX;
  memcpy(address->sun_path + 1, name.data(), name.size());
  return (socklen_t)(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

}  // namespace

Connections::Connections(std::string id, int rank, int size, int device)
    : id_(std::move(id)),
      rank_(rank),
      size_(size),
      device_(device),
      in_(size, -1),
      out_(size, -1) {}

bool Connections::connect() {
  sockaddr_un address;
  socklen_t length = make_address(id_, rank_, &address);
  listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bind(listener_, (sockaddr*)&address, length) || listen(listener_, size_)) return false;

  std::thread accepting([this] { accept_all(); });
  Introduction introduction{rank_, device_};
  for (int rank = 0; rank < size_; rank++) {
    if (rank == rank_) continue;
    out_[rank] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    length = make_address(id_, rank, &address);
    while (::connect(out_[rank], (sockaddr*)&address, length)) usleep(kRetryUs);
    write_to(out_[rank], &introduction, sizeof introduction);
  }
  accepting.join();
  close(listener_);
  return true;
}

void Connections::accept_all() {
  for (int count = 1; count < size_; count++) {
    int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    Introduction introduction;
    read_from(socket, &introduction, sizeof introduction);
    in_[introduction.rank] = socket;
    if (introduction.device == device_) shares_device_ = true;
  }
}

bool Connections::write_to(int socket, const void* data, size_t size, bool gives_up) {
  auto* bytes = (const char*)data;
  while (size > 0) {
    ssize_t count = send(socket, bytes, size, MSG_NOSIGNAL);
    if (count <= 0) return lose_peer(gives_up);
    bytes += count;
    size -= (size_t)count;
  }
  return true;
}

bool Connections::read_from(int socket, void* data, size_t size, bool gives_up) {
  auto* bytes = (char*)data;
  while (size > 0) {
    ssize_t count = read(socket, bytes, size);
    if (count <= 0) return lose_peer(gives_up);
    bytes += count;
    size -= (size_t)count;
  }
  return true;
}

bool Connections::lose_peer(bool gives_up) {
  if (gives_up) return false;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return is_aborted_; });
  throw Aborted();
}

void Connections::abort() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_aborted_ = true;
  }
  changed_.notify_all();
  for (auto* sockets : {&in_, &out_}) {
    for (int socket : *sockets) {
      if (socket >= 0) shutdown(socket, SHUT_RDWR);
    }
  }
}

void Connections::close_all() {
  for (auto* sockets : {&in_, &out_}) {
    for (int& socket : *sockets) {
      if (socket >= 0) close(socket);
      socket = -1;
    }
  }
}

}  // namespace emulated
