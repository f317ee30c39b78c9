// Force-included into every C++ source of Horovod: gethostname() answers with the address of HOROVOD_GLOO_IFACE.
//
// GlooContext::InitializeForProcessSet ignores HOROVOD_GLOO_IFACE and lets gloo resolve gethostname(). Where the name resolves
// to loopback (Debian and Ubuntu write "127.0.1.1 name" into /etc/hosts) a run over two hosts dies with "connection refused";
// where it does not resolve at all, even a run on one host ends in SIGSEGV. An address in numbers needs no resolving.
// C++11, because gloo is compiled as that.
#ifndef DANAZ_GETHOSTNAME_H
#define DANAZ_GETHOSTNAME_H

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static inline int danaz_gethostname(char* name, size_t length) {
  const char* wanted = getenv("HOROVOD_GLOO_IFACE");
  struct ifaddrs* interfaces = nullptr;
  if (wanted == nullptr || *wanted == '\0' || getifaddrs(&interfaces) != 0) {
    return gethostname(name, length);
  }
  bool found = false;
  for (struct ifaddrs* it = interfaces; it != nullptr && !found; it = it->ifa_next) {
    if (it->ifa_addr == nullptr || it->ifa_addr->sa_family != AF_INET || strcmp(it->ifa_name, wanted) != 0) {
      continue;
    }
    const struct sockaddr_in* address = reinterpret_cast<const struct sockaddr_in*>(it->ifa_addr);
    found = inet_ntop(AF_INET, &address->sin_addr, name, static_cast<socklen_t>(length)) != nullptr;
  }
  freeifaddrs(interfaces);
  return found ? 0 : gethostname(name, length);
}

// After the definition above, which still needs the real function.
#define gethostname danaz_gethostname

#endif
