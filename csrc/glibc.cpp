// Lets an extension built on a newer system load on glibc 2.28, the oldest that torch's own wheels run on.
// Here is what `auditwheel show` names beyond it; `make wheel` fails where a change adds to that.
#include <pthread.h>

#if defined(__GLIBC__)

// Since glibc 2.32 libstdc++ asks it whether a count of references needs an atomic addition. False always
// does.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// glibc 2.34 gave it a second version when it moved from libpthread to libc; the first is still there.
extern "C" int first_pthread_once(pthread_once_t* control, void (*function)())
#if defined(__x86_64__)
    ;
asm(".symver first_pthread_once, pthread_once@GLIBC_2.2.5");
#elif defined(__aarch64__)
    ;
asm(".symver first_pthread_once, pthread_once@GLIBC_2.17");
#else  // no wheels are made for it: whichever version the linker finds
    asm("__real_pthread_once");
#endif

// The linker's --wrap=pthread_once leads every call here.
extern "C" int __wrap_pthread_once(pthread_once_t* control, void (*function)()) {
  return first_pthread_once(control, function);
}

#endif
